import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mistakes import refusals
from PIL import Image

from dinoseg.extensions.tracking.grid.cells import one_hot
from dinoseg.extensions.tracking.grid.propagator import Propagator, propagate, seed
from dinoseg.extensions.tracking.propagation.masks import first_labels, to_mask
from dinoseg.extensions.tracking.propagation.settings import CRW, DINO, DINOV3, PropagationSettings
from dinoseg.utils.ranges import check_annotations

SMALL = {
    "crw": (CRW, {"context": 3, "radius": 3.0}),
    "dino": (DINO, {"radius": 2.0}),
    "dinov3": (DINOV3, {"radius": 3.0}),
}


def unit(features):
    """(T, C, h, w) to float64 (T, N, C) of unit length, zero vectors kept."""
    tokens = features.double().flatten(2).transpose(1, 2)
    return tokens / tokens.norm(dim=2, keepdim=True).clamp(min=1e-12)


def distances(grid, square):
    places = torch.cartesian_prod(torch.arange(grid[0]), torch.arange(grid[1])).double()
    apart = (places[:, None] - places[None]).abs()
    return apart.amax(2) if square else apart.square().sum(2).sqrt()


def dense_crw(features, labels, *, context, radius, top_k, temperature):
    """Frame 0 unrestricted, then the last `context` frames of a clip with as many copies of frame 0 in front."""
    tokens = unit(features)
    grid = features.shape[2:]
    far = torch.where(distances(grid, False) < radius, 0.0, -1e10).double()
    tokens = torch.cat([tokens[:1].expand(context, -1, -1), tokens])
    soft = [labels.double().flatten(1)] * (context + 1)
    for target in range(1, len(features)):
        index = [0, *range(target, target + context)]
        scores = torch.stack([tokens[i] @ tokens[target + context].T for i in index])  # (t, source, target)
        scores[1:] += far
        scores = scores.flatten(0, 1) / temperature
        order = scores.sort(dim=0, descending=True, stable=True)
        count = min(top_k, len(scores))
        weights = order.values[:count].softmax(0)
        source = torch.cat([soft[i] for i in index], dim=1)
        soft.append((source[:, order.indices[:count]] * weights).sum(1))
    return torch.stack(soft[context:]).unflatten(2, grid)


def dense_dino(features, labels, *, context, radius, top_k, temperature):
    """Exponentials times a square 0/1 mask, the k-th largest as the threshold, divided by their sum."""
    tokens = unit(features)
    grid = features.shape[2:]
    near = (distances(grid, True) <= radius).double()
    soft = [labels.double().flatten(1)]
    for target in range(1, len(features)):
        index = [0, *range(max(1, target - context), target)]
        weights = torch.cat([torch.exp(tokens[i] @ tokens[target].T / temperature) * near for i in index])
        least = weights.sort(dim=0, descending=True).values[min(top_k, len(weights)) - 1]
        weights[weights < least] = 0
        soft.append(torch.cat([soft[i] for i in index], dim=1) @ (weights / weights.sum(0)))
    return torch.stack(soft).unflatten(2, grid)


def dense_dinov3(features, labels, *, context, radius, top_k, temperature):
    """Minus infinity outside of the circle, all that reach the k-th largest, softmax."""
    tokens = unit(features)
    grid = features.shape[2:]
    soft = [labels.double().flatten(1)]
    for target in range(1, len(features)):
        index = [0, *range(max(1, target - context), target)]
        scores = torch.cat([tokens[target] @ tokens[i].T for i in index], dim=1)
        outside = (distances(grid, False) > radius).repeat(1, len(index))
        scores[outside] = -torch.inf
        least = scores.sort(dim=1, descending=True).values[:, min(top_k, scores.shape[1]) - 1]
        scores[scores < least[:, None]] = -torch.inf
        weights = (scores / temperature).softmax(1)
        soft.append((weights @ torch.cat([soft[i] for i in index], dim=1).T).T)
    return torch.stack(soft).unflatten(2, grid)


DENSE = {"crw": dense_crw, "dino": dense_dino, "dinov3": dense_dinov3}


def clip(frames, channels, grid, seed=0):
    return torch.randn(frames, channels, *grid, generator=torch.Generator().manual_seed(seed))


def tied_clip(frames, grid, seed=0):
    """Features of exact length 1 and exact products, few of them distinct, some of them zero."""
    kinds = torch.cat([torch.eye(4), torch.full((1, 4), 0.5), torch.zeros(1, 4)])
    draw = torch.randint(len(kinds), (frames, *grid), generator=torch.Generator().manual_seed(seed))
    return kinds[draw].permute(0, 3, 1, 2)


def soft_labels(count, grid, seed=1):
    return torch.rand(count, *grid, generator=torch.Generator().manual_seed(seed)).softmax(0)


def compare(name, features, labels, **changes):
    settings, small = SMALL[name]
    values = {**small, **changes}
    shared = {key: values.get(key, getattr(settings, key)) for key in ("context", "radius", "top_k", "temperature")}
    ours = propagate(features, labels, settings=settings, **values)
    expected = DENSE[name](features, labels if labels.ndim == 3 else one_hot(labels), **shared)
    assert ours.shape == expected.shape
    torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-5)


def case(grid, *, frames=4, channels=8, labels=2, **changes):
    return clip(frames, channels, grid), soft_labels(labels, grid), changes


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize(
    ("features", "labels", "changes"),
    [
        case((9, 17), frames=6, labels=3),
        case((19, 10), frames=10, channels=5),
        case((1, 13), channels=3, labels=1),
        case((2, 2), frames=3, channels=4),
        case((1, 1), frames=2, channels=1),
        (clip(4, 6, (9, 11)), torch.from_numpy(np.random.default_rng(2).integers(0, 4, (9, 11)).astype(np.uint8)), {}),
        *[(tied_clip(6, (10, 9), seed), soft_labels(3, (10, 9)), {}) for seed in range(3)],
        (torch.eye(4)[0].expand(5, 9, 10, 4).permute(0, 3, 1, 2), soft_labels(2, (9, 10)), {}),
        (torch.zeros(3, 4, 5, 6), soft_labels(2, (5, 6)), {}),
        *[case((6, 7), top_k=top_k) for top_k in (1, 2, 10_000)],
        *[case((6, 7), radius=radius) for radius in (1e9, 2.5, 0.5)],  # beyond the grid, and of one cell
    ],
)
def test_propagation_equals_the_dense_reference(name, features, labels, changes):
    compare(name, features, labels, **changes)


@pytest.mark.parametrize("name", DENSE)
class TestProtocols:
    @pytest.mark.heavy
    def test_the_protocol_itself_on_a_grid_wider_than_its_window(self, name):
        own = {key: getattr(SMALL[name][0], key) for key in ("context", "radius")}
        compare(name, clip(3, 6, (14, 30)), soft_labels(3, (14, 30)), **own)

    @pytest.mark.parametrize("cut", [0, 5, 11])
    def test_restart_from_a_saved_state_is_exact(self, name, cut):
        features = clip(12, 6, (9, 10))
        labels = soft_labels(3, (9, 10))
        settings = PropagationSettings(**{**vars(SMALL[name][0]), "context": 4})
        whole = propagate(features, labels, settings=settings)
        first, second = Propagator(settings), Propagator(settings)
        for number in range(cut):
            first.step(features[number], labels if number == 0 else None)
        second.load(first.state())
        rest = [second.step(features[number], labels if number == 0 else None) for number in range(cut, 12)]
        assert torch.equal(torch.stack(rest), whole[cut:])
        assert len(second.state()["features"]) == 5  # the first frame and its context

    def test_streaming_equals_batch_even_if_its_labels_are_modified(self, name):
        features = clip(12, 6, (9, 10))
        labels = soft_labels(3, (9, 10))
        whole = propagate(features, labels, settings=SMALL[name][0])
        given = labels.clone()
        propagator = Propagator(SMALL[name][0])
        for number, frame in enumerate(features):
            soft = propagator.step(frame, given if number == 0 else None)
            assert torch.equal(soft, whole[number])
            soft.fill_(7)
            given.fill_(7)
        assert len(propagator.state()["features"]) == SMALL[name][0].context + 1


def moving_square(frames):
    """A square of its own feature on a ground where every cell differs; it moves by one cell down and two right."""
    ground = clip(1, 16, (20, 24))[0] * 0.2
    ground[0] = 0
    features, masks = [], []
    for number in range(frames):
        mask = torch.zeros(20, 24, dtype=torch.long)
        mask[2 + number : 7 + number, 1 + 2 * number : 6 + 2 * number] = 1
        frame = ground.clone()
        frame[:, mask == 1] = torch.eye(16)[0][:, None]
        features.append(frame)
        masks.append(mask)
    return torch.stack(features), torch.stack(masks)


def test_the_defaults_are_dinov3s():
    features = clip(9, 5, (8, 9))
    labels = soft_labels(2, (8, 9))
    named = propagate(features, labels, context=7, radius=12, window="circle", top_k=5, temperature=0.2)
    assert torch.equal(propagate(features, labels), named)
    assert PropagationSettings() == DINOV3


@pytest.mark.parametrize(
    ("given", "back"), [(torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float64,) * 2]
)
def test_types(given, back):
    features = clip(3, 5, (6, 7)).to(given)
    labels = soft_labels(2, (6, 7))
    ours = propagate(features, labels, radius=3)
    assert ours.dtype == back and not ours.requires_grad
    expected = dense_dinov3(features, labels, context=7, radius=3, top_k=5, temperature=0.2)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-5)


def test_autocast_and_feature_norms_change_nothing():
    features = clip(4, 5, (6, 7))
    labels = soft_labels(2, (6, 7))
    plain = propagate(features, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(propagate(features, labels), plain)
    torch.testing.assert_close(propagate(features * 300, labels), plain)
    cold = propagate(features, labels, temperature=1e-42)
    torch.testing.assert_close(cold, propagate(features, labels, top_k=1))


def test_a_later_object_gets_a_channel_and_is_followed():
    features, masks = moving_square(6)
    frames = {0: torch.zeros_like(masks[0]), 2: masks[2] * 3}
    soft = propagate(features, frames, radius=4)
    assert soft.shape[1] == 4
    assert torch.equal(soft[:2].argmax(1), torch.zeros_like(masks[:2]))
    assert torch.equal(soft[2].argmax(0), masks[2] * 3)
    assert (soft[3:, 3][masks[3:] == 1] > 0.2).all() and (soft[3:, 3][masks[3:] == 0] < 1e-3).all()
    torch.testing.assert_close(soft.sum(1), torch.ones_like(soft[:, 0]))
    first, second = (Propagator(PropagationSettings(radius=4)) for _ in range(2))
    for number in range(4):
        first.step(features[number], frames.get(number))
    second.load(first.state())
    assert torch.equal(second.step(features[4]), soft[4])


def test_seeded_cells_take_the_given_labels():
    soft = torch.tensor([[[0.25, 1.0, 0.0]], [[0.75, 0.0, 1.0]]])
    given = torch.tensor([[[1.0, 0.5, 0.0]], [[0.0, 0.0, 0.0]], [[0.0, 0.5, 1.0]]])
    expected = torch.tensor([[[0.25, 0.5, 0.0]], [[0.75, 0.0, 0.0]], [[0.0, 0.5, 1.0]]])
    assert torch.equal(seed(soft, given), expected)
    assert torch.equal(seed(soft, given[:1]), soft)


@pytest.mark.parametrize(
    ("size", "grid"),
    [((480, 854), (60, 106)), ((97, 61), (13, 8)), ((480, 480), (58, 43)), ((5, 7), (9, 11)), ((1, 3), (1, 1))],
)
def test_first_labels_are_those_of_each_papers_library(size, grid):
    blocks = np.random.default_rng(3).integers(0, 4, (7, 9)).astype(np.uint8)
    mask = torch.from_numpy(cv2.resize(blocks, size[::-1], interpolation=cv2.INTER_NEAREST))
    full = F.one_hot(mask.long(), 4).permute(2, 0, 1).float()
    dino, dinov3, crw = (first_labels(mask, grid, settings, num_labels=4) for settings in (DINO, DINOV3, CRW))
    assert np.array_equal(dino.argmax(0), Image.fromarray(mask.numpy()).resize(grid[::-1], Image.Resampling.NEAREST))
    assert torch.equal(dino.sum(0), torch.ones(grid))
    assert torch.equal(dinov3, F.interpolate(full[None], grid, mode="nearest-exact")[0])
    bilinear = cv2.resize(full.permute(1, 2, 0).numpy(), grid[::-1], interpolation=cv2.INTER_LINEAR)
    np.testing.assert_allclose(crw, bilinear.reshape(*grid, 4).transpose(2, 0, 1), atol=1e-6)


def test_an_object_between_the_cells_keeps_its_empty_channel():
    mask = torch.zeros(16, 16, dtype=torch.uint8)
    mask[0, 0] = 2
    for settings in (DINO, DINOV3):
        assert first_labels(mask, (2, 2), settings).sum((1, 2)).tolist() == [4, 0, 0]


class TestToMask:
    soft = soft_labels(4, (5, 6))

    def test_dinov3(self):
        large = F.interpolate(self.soft[None], (31, 50), mode="nearest")[0].numpy()
        low = large.min((1, 2), keepdims=True)
        high = large.max((1, 2), keepdims=True)
        assert np.array_equal(to_mask(self.soft, (31, 50), DINOV3), ((large - low) / (high - low)).argmax(0))

    def test_dino(self):
        soft = self.soft.clone()
        soft[3] = 0
        large = cv2.resize(soft.permute(1, 2, 0).numpy(), (48, 40), interpolation=cv2.INTER_LINEAR).transpose(2, 0, 1)
        for channel in large[:3]:
            channel -= channel.min()
            channel /= channel.max()
        expected = np.asarray(Image.fromarray(large.argmax(0).astype(np.uint8)).resize((61, 43), 0))
        assert np.array_equal(to_mask(soft, (43, 61), DINO, patch_size=8), expected)

    def test_crw(self):
        large = cv2.resize(self.soft.permute(1, 2, 0).numpy(), (61, 43), interpolation=cv2.INTER_LINEAR)
        assert np.array_equal(to_mask(self.soft, (43, 61), CRW), large.argmax(2))

    def test_constant_channels(self):
        gone = torch.stack([torch.ones(2, 2), torch.zeros(2, 2)])
        covered = gone.flip(0)
        for settings in (CRW, DINO, DINOV3):
            assert not to_mask(gone, (4, 4), settings, patch_size=2).any()
        assert to_mask(covered, (4, 4), DINO, patch_size=2).all()  # not a number beats all numbers there
        assert not to_mask(covered, (4, 4), DINOV3).any()  # and is 0 here, where the background comes first
        assert to_mask(covered, (4, 4), DINOV3).dtype is torch.uint8

    def test_rounding_is_not_stretched(self):
        soft = torch.stack([torch.full((2, 2), 0.25), torch.full((2, 2), 0.75)])
        soft[1, 0, 0] += 6e-8
        assert soft[1, 0, 0] > 0.75
        assert not to_mask(soft, (2, 2), DINOV3).any()


FEATURES, LABELS = case((5, 6), frames=3, channels=4)[:2]
IDS = torch.zeros(5, 6, dtype=torch.long)
SETTINGS = check_annotations(PropagationSettings)


def first_of(mask, num_labels=None):
    return lambda: first_labels(mask, (2, 2), DINO, num_labels=num_labels)


def propagated(features=FEATURES, labels=LABELS, **changes):
    return lambda: propagate(features, labels, **changes)


def step(*frames):
    """Return a function that gives frames to one propagator, the first with labels."""
    propagator = Propagator()
    return lambda: [propagator.step(frame, LABELS if index == 0 else None) for index, frame in enumerate(frames)]


test_message_names_value_and_remedy = refusals(
    {
        "id 256": (first_of(torch.full((4, 4), 256)), "id 256: ids must be 0 to 255; 0 is the background. Renumber"),
        "a negative id": (first_of(torch.full((4, 4), -1)), "id -1"),
        "an id beyond the labels": (first_of(torch.full((4, 4), 5), 3), "id 5: ids must be 0 to"),
        "a mask of three sides": (first_of(torch.zeros(3, 4, 4)), "shape (3, 4, 4). Give one id"),
        "an empty mask": (first_of(torch.zeros(0, 4)), "shape (0, 4)"),
        "no patch size": (lambda: to_mask(torch.zeros(2, 2, 2), (4, 4), DINO), "needs the backbone's patch_size"),
        "257 labels": (lambda: to_mask(torch.zeros(257, 1, 1), (1, 1)), "there are 257 labels"),
        "context of 0": (propagated(context=0), "context=0 is out of range. Give a whole number of at least 1"),
        "top_k of 0": (propagated(top_k=0), "top_k=0 is out of range"),
        "negative radius": (propagated(radius=-1), "radius=-1 is out of range. Give"),
        "temperature of 0": (propagated(temperature=0), "temperature=0 is out of range. Give a number above 0"),
        "unknown window": (propagated(window="disc"), "window=disc is unknown. Choose one of circle, square"),
        "unknown first": (lambda: SETTINGS(first="area"), "first=area is unknown"),
        "no cell": (lambda: SETTINGS(radius=0, inclusive=False), "radius=0 with inclusive=false leaves no cell"),
        "labels of another grid": (propagated(labels=LABELS.mT), "(2, 6, 5), the features the grid (5, 6)"),
        "ids of another grid": (propagated(labels=IDS[:4]), "shape (4, 6)", "first_labels"),
        "labels of four sides": (propagated(labels=LABELS[None]), "shape (1, 2, 5, 6)"),
        "no first labels": (propagated(labels={1: LABELS}), "The first frame has no labels. Give its mask"),
        "infinite features": (propagated(FEATURES * torch.inf), "not finite, ", " float32"),
        "labels beyond the end": (propagated(labels={0: LABELS, 3: LABELS}), "frame 3 of a clip of 3 frames"),
        "later labels of another grid": (propagated(labels={0: LABELS, 2: LABELS[:, :4]}), "shape (2, 4, 6)"),
        "no frame": (propagated(FEATURES[:0]), "at least one frame"),
        "one frame": (propagated(FEATURES[0]), "(T, C, h, w)"),
        "a step of a clip": (step(FEATURES), "Give (C, h, w)"),
        "a step of another size": (
            step(FEATURES[0], FEATURES[1, :, :, :5]),
            *("4 x 5 x 5, those of the first 4 x 5 x 6 (C, h, w). ", " resize or split"),
        ),
    }
)
