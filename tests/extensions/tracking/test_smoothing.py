import gc
import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mistakes import assert_refused
from torch import nn

from dinoseg.core.contracts import Backbone, Head
from dinoseg.core.geometry import upsample
from dinoseg.extensions.query_heads.eomt import EomtHead
from dinoseg.extensions.tracking.grid.cells import area_mean, one_hot
from dinoseg.extensions.tracking.grid.propagator import Propagator
from dinoseg.extensions.tracking.propagation.settings import DINOV3, PropagationSettings
from dinoseg.extensions.tracking.segmenter_tracker import with_features
from dinoseg.extensions.tracking.smoothing import SmoothingTracker
from dinoseg.models.heads.linear import LinearHead
from dinoseg.models.model import SegmentationModel
from dinoseg.utils.errors import UserError

NEAR = PropagationSettings(context=3, radius=2)


class Strided(Backbone):
    """A pyramid whose last map is finer than its patch size: some of its cells lie on padding alone."""

    dim = 48
    patch_size = 16
    num_layers = 1
    depth = 1
    unused = ()

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, images):
        padded = F.pad(images, (0, -images.shape[-1] % 16, 0, -images.shape[-2] % 16))
        return [F.pixel_unshuffle(padded, 4) * self.scale]


class Brightness(Head):
    """Class 1 where red outweighs green, on the colours as they are."""

    def forward(self, features):
        red, green, _ = features[0].unflatten(1, (3, 16)).mean(2).unbind(1)
        return torch.stack([green, red], dim=1) * 10

    def predict(self, outputs, size, valid):
        return upsample(outputs, size, valid)


def video(count, size=(37, 50), seed=0, noise=60):
    """Frames of a square that moves over a slope of grey, with noise in every frame."""
    draw = np.random.default_rng(seed)
    frames = []
    for number in range(count):
        frame = np.broadcast_to(np.linspace(20, 90, size[1])[None, :, None], (*size, 3)).copy()
        frame[8:24, 4 + number : 20 + number] = (200, 160, 60)
        frames.append((frame + draw.normal(0, noise, frame.shape)).clip(0, 255).astype(np.uint8))
    return frames


@pytest.fixture
def segmenter(tiny_backbone):
    """A segmenter whose random head is sure enough to have several classes in a picture."""

    def build(head=LinearHead, classes=4, **options):
        backbone = tiny_backbone()
        torch.manual_seed(1)
        made = head(24, 1, classes, **({"patch_size": 8, "blocks": 1} if head is EomtHead else {}))
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.mul_(4)
        return SegmentationModel(backbone, made, **options).eval()

    return build


def alone(model, frames):
    images = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)
    with torch.no_grad():
        return model(images).scores().max(dim=1).indices.to(torch.uint8).numpy()


def run(tracker, frames, batch=2):
    found = []
    for start in range(0, len(frames), batch):
        part = frames[start : start + batch]
        found += tracker.track(part, [None] * len(part))
    return found


def cell_mean(pixels, grid, valid):
    """Return the mean of each cell pixel by pixel, in float64."""
    height, width = pixels.shape[-2:]
    steps = (height / (grid[0] * valid[0]), width / (grid[1] * valid[1]))
    result = np.zeros((len(pixels), *grid))
    for row in range(grid[0]):
        for column in range(grid[1]):
            total = 0.0
            for y in range(height):
                for x in range(width):
                    tall = min(y + 1, (row + 1) * steps[0]) - max(y, row * steps[0])
                    wide = min(x + 1, (column + 1) * steps[1]) - max(x, column * steps[1])
                    if tall > 0 and wide > 0:
                        result[:, row, column] += pixels[:, y, x].double().numpy() * tall * wide
                        total += tall * wide
            result[:, row, column] /= max(total, 1e-12)
    return result


@pytest.mark.parametrize(
    ("size", "grid", "valid"),
    [((8, 12), (2, 3), (1.0, 1.0)), ((7, 10), (2, 3), (7 / 8, 10 / 12)), ((5, 9), (4, 2), (0.7, 0.9)),
     ((3, 4), (5, 7), (1.0, 0.6)), ((1, 1), (1, 1), (1 / 8, 1 / 8))],
)  # fmt: skip
def test_a_cell_has_the_mean_of_its_pixels(size, grid, valid):
    pixels = torch.rand(3, *size, generator=torch.Generator().manual_seed(0)).softmax(0)
    found = area_mean(pixels, grid, valid)
    np.testing.assert_allclose(found.double(), cell_mean(pixels, grid, valid), atol=1e-6)
    if valid == (1.0, 1.0):
        torch.testing.assert_close(found, F.adaptive_avg_pool2d(pixels, grid))


def reference(model, frames, settings, share):
    """Return the smoothed masks by the definition, frame by frame, with all frames kept."""
    images = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)
    with torch.no_grad():
        features = torch.cat([model.backbone(model.pixels(image[None]))[-1] for image in images])
        prediction = model(images)
    pixels = prediction.logits().softmax(1)
    grid = features.shape[2:]
    valid = prediction.valid
    cells = [torch.from_numpy(cell_mean(frame, grid, valid)).float() for frame in pixels]
    mixed, found = [cells[0]], [pixels[0].argmax(0)]
    for now in range(1, len(frames)):
        shown = [0, *range(max(1, now - settings.context), now)]
        past = F.normalize(features[shown], dim=1).permute(0, 2, 3, 1)
        # all frames but the last are given as they were mixed: seeding sets each cell to its whole label
        propagator = Propagator(settings)
        propagator.load({"features": past, "labels": torch.stack([mixed[at] for at in shown]).permute(0, 2, 3, 1)})
        mixed.append((1 - share) * cells[now] + share * propagator.step(features[now]))
        change = upsample((mixed[now] - cells[now])[None], frames[0].shape[:2], valid)[0]
        found.append((pixels[now] + change).argmax(0))
    return torch.stack(found).numpy()


@pytest.mark.parametrize(
    ("size", "options"),
    [
        ((40, 48), {}),
        pytest.param((37, 50), {}, marks=pytest.mark.heavy),
        ((37, 50), {"scale": 0.7}),
        ((40, 48), {"longest": 41}),
    ],
)
def test_masks_are_those_of_the_definition(segmenter, size, options):
    model = segmenter(**options)
    frames = video(7, size)
    tracker = SmoothingTracker(model, NEAR, smoothing=0.6)
    found = np.stack(run(tracker, frames))
    assert found.dtype == np.uint8 and found.shape == (7, *size)
    assert tracker.state()["features"].shape[0] == NEAR.context + 1
    expected = reference(model, frames, NEAR, 0.6)
    assert (found == expected).mean() > 0.999
    own = alone(model, frames)
    assert (found[0] == own[0]).all() and (found[1:] != own[1:]).mean() > 0.01
    shares = {"before": np.mean(own[1:] != own[:-1]), "after": np.mean(found[1:] != found[:-1])}
    assert tracker.flicker() == pytest.approx(shares) and shares["after"] > 0


@pytest.mark.parametrize("head", [LinearHead, EomtHead])
def test_without_smoothing_the_masks_are_the_segmenter_s_own(segmenter, head):
    model = segmenter(head)
    frames = video(5)
    own = alone(model, frames)
    for share in (0, 1e-9):
        found = np.stack(run(SmoothingTracker(model, NEAR, smoothing=share), frames, batch=5))
        np.testing.assert_array_equal(found, own)


def test_a_still_noisy_scene_flickers_less():
    model = SegmentationModel(Strided(), Brightness()).eval()
    draw = np.random.default_rng(3)
    scene = np.where(np.arange(96)[None, :, None] < 50, (110, 130, 200), (130, 110, 20)) * np.ones((64, 1, 1))
    frames = [(scene + draw.normal(0, 60, scene.shape)).clip(0, 255).astype(np.uint8) for _ in range(10)]
    tracker = SmoothingTracker(model, DINOV3, smoothing=0.7)
    found = np.stack(run(tracker, frames))
    flicker = tracker.flicker()
    assert 0 < flicker["after"] < 0.6 * flicker["before"]
    right = np.arange(96) >= 50
    assert (found[4:] == right).mean() > (alone(model, frames)[4:] == right).mean() + 0.02


@pytest.mark.parametrize(("head", "options"), [(LinearHead, {}), (EomtHead, {}), (EomtHead, {"scale": 0.5})])
def test_one_pass_gives_prediction_and_features(segmenter, head, options):
    model = segmenter(head, **options)
    images = torch.randint(0, 256, (2, 3, 37, 50), dtype=torch.uint8)
    passes, read = [], []
    hook = model.backbone.blocks[0].register_forward_hook(lambda *_: passes.append(1))
    if head is EomtHead:
        model.head.upscale.register_forward_pre_hook(lambda _, given: read.append(given[0]))
    with torch.no_grad():
        prediction, features = with_features(model, images)
        hook.remove()
        torch.testing.assert_close(prediction.scores(), model(images).scores())
        expected = read[0] if read else model.backbone(model.pixels(images))[-1]
    assert len(passes) == 1
    torch.testing.assert_close(features, expected)
    assert not model.backbone._forward_hooks and not model.backbone.norm._forward_hooks


def test_cells_on_padding_alone_are_left_out():
    torch.manual_seed(0)
    model = SegmentationModel(Strided(), LinearHead(48, 1, 2)).eval()
    tracker = SmoothingTracker(model, NEAR, smoothing=0.5)
    frames = video(3, (18, 35))
    assert np.stack(run(tracker, frames)).shape == (3, 18, 35)
    labels = tracker.state()["labels"]
    assert labels.shape == (3, 5, 9, 2)  # ceil(18 / 4) x ceil(35 / 4), of a grid of 8 x 12
    torch.testing.assert_close(labels.sum(-1), torch.ones(3, 5, 9))


def test_restored_smoothing_continues_exactly(segmenter):
    model = segmenter()
    frames = video(9)
    whole = SmoothingTracker(model, NEAR)
    expected = run(whole, frames, batch=1)
    first, second = SmoothingTracker(model, NEAR), SmoothingTracker(model, NEAR)
    assert first.state() == {} and first.flicker() == {"before": 0.0, "after": 0.0}
    second.load(first.state())
    found = run(second, frames[:4], batch=1)
    state = {key: value.clone() for key, value in second.state().items()}
    second.track(frames[7:8], [None])  # what comes after does not change the state
    third = SmoothingTracker(model, NEAR)
    third.load(state)
    found += run(third, frames[4:], batch=1)
    np.testing.assert_array_equal(found, expected)
    assert third.flicker() == whole.flicker() and third.settings == whole.settings
    assert whole.settings != SmoothingTracker(model, NEAR, smoothing=0.4).settings != SmoothingTracker(model).settings
    assert whole.settings != SmoothingTracker(segmenter(scale=0.5), NEAR).settings
    assert json.loads(json.dumps(whole.settings)) == whole.settings


def test_masks_are_the_caller_s_own(segmenter):
    tracker = SmoothingTracker(segmenter(), NEAR)
    frames = video(2)
    tracker.track(frames[:1], [None])[0][:] = 99
    assert tracker.track(frames[1:], [None])[0].max() < 4 and tracker.flicker()["after"] < 0.9


def tensor_bytes():
    gc.collect()
    tensors = (part for part in gc.get_objects() if issubclass(type(part), torch.Tensor))
    return sum(part.numel() * part.element_size() for part in tensors)


@pytest.mark.heavy
def test_memory_does_not_grow_with_the_video(segmenter):
    model = segmenter()
    frames = video(4, (24, 32))
    tracker = SmoothingTracker(model, NEAR)
    run(tracker, frames * 3)
    after = tensor_bytes()
    run(tracker, frames * 5)
    assert tensor_bytes() == after
    assert tracker.state()["features"].shape[0] == NEAR.context + 1


def test_labels_for_a_trained_segmenter_are_refused(segmenter):
    model = segmenter()
    frames = video(3)
    tracker = SmoothingTracker(model, NEAR)
    labels = [frames[0][..., 0], None, None]
    assert_refused(lambda: tracker.track(frames, labels), "labels are given, but a trained segmenter")
    tracker.track(frames, [None] * 3)
    assert tracker.track([], []) == []
    shorter = SmoothingTracker(model, PropagationSettings(context=1))
    assert_refused(lambda: shorter.load(tracker.state()), "context=1, but the state holds")


def test_recorded_settings_are_only_those_in_use(segmenter):
    model = segmenter()
    told = SmoothingTracker(model, NEAR).settings
    assert set(told["tracker"]) == set(asdict(NEAR)) - {
        *("first", "upsample", "min_max", "short_side", "long_multiple", "rounding", "resample", "enlarge")
    }
    assert SmoothingTracker(model, replace(NEAR, short_side=7, first="bilinear")).settings == told
    for key, value in {"context": 1, "radius": 1, "top_k": 2, "temperature": 0.3, "repeat_first": True}.items():
        assert SmoothingTracker(model, replace(NEAR, **{key: value})).settings != told, key
    half = SmoothingTracker(model, NEAR, autocast=lambda: torch.autocast("cpu", torch.bfloat16)).settings
    assert half["precision"] == "bfloat16" and told["precision"] == "float32"


@pytest.mark.parametrize("lost", ["features", "labels", "masks", "counts"])
def test_a_state_that_is_not_whole_is_refused(segmenter, lost):
    tracker = SmoothingTracker(segmenter(), NEAR)
    run(tracker, video(2))
    with pytest.raises(ValueError, match=lost):
        SmoothingTracker(segmenter(), NEAR).load({key: value for key, value in tracker.state().items() if key != lost})


def test_ids_are_labels_too_and_shapes_are_checked():
    propagator = Propagator(NEAR)
    ids = torch.tensor([[0, 1], [2, 1]])
    torch.testing.assert_close(propagator.blend(torch.rand(3, 2, 2), ids, 0.5), one_hot(ids))
    for features, labels in ((torch.rand(3, 2, 3), ids), (torch.rand(3, 2, 2), ids[:1]), (torch.rand(2, 2), ids)):
        with pytest.raises(UserError):
            propagator.blend(features, labels, 0.5)
