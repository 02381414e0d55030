import gc
import math

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from dinoseg.tracking.grid.cells import one_hot
from dinoseg.tracking.grid.propagator import Propagator, propagate, seed
from dinoseg.tracking.propagation.masks import first_labels, to_mask
from dinoseg.tracking.propagation.settings import CRW, DINO, DINOV3, PropagationSettings
from dinoseg.utils.errors import UserError
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


@pytest.mark.parametrize("name", DENSE)
class TestAgainstDense:
    @pytest.mark.parametrize(
        ("frames", "channels", "grid", "labels"),
        [(6, 8, (9, 17), 3), (10, 5, (19, 10), 2), (4, 3, (1, 13), 1), (3, 4, (2, 2), 2), (2, 1, (1, 1), 1)],
    )
    def test_random_features_equal_the_reference(self, name, frames, channels, grid, labels):
        compare(name, clip(frames, channels, grid), soft_labels(labels, grid))

    def test_the_protocol_itself_on_a_grid_wider_than_its_window(self, name):
        own = {key: getattr(SMALL[name][0], key) for key in ("context", "radius")}
        compare(name, clip(3, 6, (14, 30)), soft_labels(3, (14, 30)), **own)

    def test_ids(self, name):
        ids = torch.randint(4, (9, 11), generator=torch.Generator().manual_seed(2)).to(torch.uint8)
        compare(name, clip(4, 6, (9, 11)), ids)

    @pytest.mark.parametrize("seed", range(3))
    def test_ties_equal_the_reference(self, name, seed):
        compare(name, tied_clip(6, (10, 9), seed), soft_labels(3, (10, 9)))

    def test_identical_features_equal_the_reference(self, name):
        compare(name, torch.eye(4)[0].expand(5, 9, 10, 4).permute(0, 3, 1, 2), soft_labels(2, (9, 10)))

    def test_zero_features_equal_the_reference(self, name):
        compare(name, torch.zeros(3, 4, 5, 6), soft_labels(2, (5, 6)))

    @pytest.mark.parametrize("top_k", [1, 2, 10_000])
    def test_top_k(self, name, top_k):
        compare(name, clip(4, 8, (6, 7)), soft_labels(2, (6, 7)), top_k=top_k)

    def test_a_window_beyond_the_grid_and_of_one_cell(self, name):
        compare(name, clip(4, 8, (6, 7)), soft_labels(2, (6, 7)), radius=1e9)
        compare(name, clip(4, 8, (6, 7)), soft_labels(2, (6, 7)), radius=0.5)
        compare(name, clip(4, 8, (6, 7)), soft_labels(2, (6, 7)), radius=2.5)

    def test_one_frame_is_its_labels(self, name):
        labels = soft_labels(3, (4, 5))
        assert torch.equal(propagate(clip(1, 3, (4, 5)), labels, settings=SMALL[name][0]), labels[None])


@pytest.mark.parametrize("name", DENSE)
class TestStreaming:
    def test_streaming_equals_batch(self, name):
        features, labels = clip(12, 6, (9, 10)), soft_labels(3, (9, 10))
        settings = SMALL[name][0]
        propagator = Propagator(settings)
        soft = [propagator.step(features[0], labels), *(propagator.step(frame) for frame in features[1:])]
        assert torch.equal(torch.stack(soft), propagate(features, labels, settings=settings))

    @pytest.mark.parametrize("cut", [0, 1, 5, 11])
    def test_restart_from_a_saved_state_is_exact(self, name, cut, tmp_path):
        features, labels = clip(12, 6, (9, 10)), soft_labels(3, (9, 10))
        settings = PropagationSettings(**{**vars(SMALL[name][0]), "context": 4})
        whole = propagate(features, labels, settings=settings)
        first = Propagator(settings)
        for number in range(cut):
            first.step(features[number], labels if number == 0 else None)
        torch.save(first.state(), tmp_path / "state.pt")
        second = Propagator(settings)
        second.load(torch.load(tmp_path / "state.pt"))
        rest = [second.step(features[number], labels if number == 0 else None) for number in range(cut, 12)]
        assert torch.equal(torch.stack(rest), whole[cut:])

    def test_returned_labels_may_be_modified(self, name):
        features, labels = clip(5, 6, (5, 6)), soft_labels(1, (5, 6))
        whole = propagate(features, labels, settings=SMALL[name][0])
        given, propagator = labels.clone(), Propagator(SMALL[name][0])
        for number, frame in enumerate(features):
            soft = propagator.step(frame, given if number == 0 else None)
            assert torch.equal(soft, whole[number])
            soft.fill_(7)
            given.fill_(7)

    @pytest.mark.heavy
    def test_memory_is_flat_over_600_frames(self, name):
        propagator = Propagator(SMALL[name][0])
        tensors = []
        for number in range(600):
            propagator.step(clip(1, 3, (4, 5), number)[0], torch.eye(4, 5).long() if number == 0 else None)
            if number % 150 == 149:
                gc.collect()
                alive = [item for item in gc.get_objects() if type(item) is torch.Tensor]
                tensors.append((len(alive), sum(item.numel() for item in alive)))
                del alive
        assert len(set(tensors)) == 1
        assert len(propagator.state()["features"]) == SMALL[name][0].context + 1


def moving_square(frames, grid=(20, 24), side=5):
    """A square of its own feature on a ground where every cell differs; it moves by one cell down and two right."""
    ground = clip(1, 16, grid)[0] * 0.2
    ground[0] = 0
    features, masks = [], []
    for number in range(frames):
        mask = torch.zeros(grid, dtype=torch.long)
        mask[2 + number : 2 + number + side, 1 + 2 * number : 1 + 2 * number + side] = 1
        frame = ground.clone()
        frame[:, mask == 1] = torch.eye(16)[0][:, None]
        features.append(frame)
        masks.append(mask)
    return torch.stack(features), torch.stack(masks)


@pytest.mark.parametrize("name", DENSE)
def test_a_moving_square_is_followed_exactly(name):
    features, masks = moving_square(9)
    soft = propagate(features, masks[0], settings=SMALL[name][0])
    assert torch.equal(soft.argmax(1), masks)
    settings = SMALL[name][0]
    pixels = torch.stack([to_mask(frame, (160, 192), settings, patch_size=8) for frame in soft]).long()
    large = masks.repeat_interleave(8, 1).repeat_interleave(8, 2)
    assert torch.equal(pixels[:, 4::8, 4::8], masks)
    assert (pixels != large).float().mean() < 0.01


def test_the_defaults_are_dinov3s():
    features, labels = clip(9, 5, (8, 9)), soft_labels(2, (8, 9))
    named = propagate(features, labels, context=7, radius=12, window="circle", top_k=5, temperature=0.2)
    assert torch.equal(propagate(features, labels), named)
    assert PropagationSettings() == DINOV3


@pytest.mark.parametrize(
    "changes", [{"context": 1}, {"radius": 1}, {"window": "square"}, {"top_k": 1}, {"temperature": 0.01}]
)
def test_each_parameter_matters(changes):
    features, labels = clip(9, 5, (20, 20)), soft_labels(2, (20, 20))
    plain = propagate(features, labels, radius=3)
    assert (propagate(features, labels, **{"radius": 3, **changes}) - plain).abs().max() > 1e-3


@pytest.mark.parametrize(
    "changes", [{"inclusive": False}, {"ties": False}, {"window_first": False}, {"repeat_first": True}]
)
def test_each_option_matters(changes):
    features, labels = tied_clip(4, (12, 12)), soft_labels(2, (12, 12))
    plain = propagate(features, labels, settings=PropagationSettings(radius=3))
    assert (propagate(features, labels, settings=PropagationSettings(radius=3, **changes)) - plain).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("given", "back"), [(torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float64,) * 2]
)
def test_types(given, back):
    features, labels = clip(3, 5, (6, 7)).to(given), soft_labels(2, (6, 7))
    ours = propagate(features, labels, radius=3)
    assert ours.dtype == back and not ours.requires_grad
    expected = dense_dinov3(features, labels, context=7, radius=3, top_k=5, temperature=0.2)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-5)


def test_autocast_changes_nothing():
    features, labels = clip(3, 5, (6, 7)), soft_labels(2, (6, 7))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        halved = propagate(features, labels)
    assert torch.equal(halved, propagate(features, labels))


def test_feature_norms_and_tiny_temperatures_do_not_matter():
    features, labels = clip(4, 5, (6, 7)), soft_labels(2, (6, 7))
    torch.testing.assert_close(propagate(features * 300, labels), propagate(features, labels))
    cold = propagate(features, labels, temperature=1e-42)
    torch.testing.assert_close(cold, propagate(features, labels, top_k=1))


class TestSeed:
    def test_a_later_object_gets_a_channel_and_is_followed(self):
        features, masks = moving_square(6)
        frames = {0: torch.zeros_like(masks[0]), 2: masks[2] * 3}
        soft = propagate(features, frames, radius=4)
        assert soft.shape[1] == 4
        assert torch.equal(soft[:2].argmax(1), torch.zeros_like(masks[:2]))
        assert torch.equal(soft[2].argmax(0), masks[2] * 3)
        assert (soft[3:, 3][masks[3:] == 1] > 0.2).all() and (soft[3:, 3][masks[3:] == 0] < 1e-3).all()
        torch.testing.assert_close(soft.sum(1), torch.ones_like(soft[:, 0]))

    def test_state_after_a_later_seed_restores_exactly(self):
        features, masks = moving_square(6)
        whole = propagate(features, {0: masks[0], 2: masks[2] * 2}, radius=4)
        propagator = Propagator(PropagationSettings(radius=4))
        for number in range(4):
            propagator.step(features[number], {0: masks[0], 2: masks[2] * 2}.get(number))
        other = Propagator(PropagationSettings(radius=4))
        other.load(propagator.state())
        assert torch.equal(other.step(features[4]), whole[4])

    def test_arithmetic(self):
        soft = torch.tensor([[[0.25, 1.0, 0.0]], [[0.75, 0.0, 1.0]]])
        given = torch.tensor([[[1.0, 0.5, 0.0]], [[0.0, 0.0, 0.0]], [[0.0, 0.5, 1.0]]])
        expected = torch.tensor([[[0.25, 0.5, 0.0]], [[0.75, 0.0, 0.0]], [[0.0, 0.5, 1.0]]])
        assert torch.equal(seed(soft, given), expected)
        assert torch.equal(seed(soft, given[:1]), soft)


def id_mask(size, count=4, seed=3):
    draw = np.random.default_rng(seed)
    blocks = draw.integers(0, count, (7, 9)).astype(np.uint8)
    return cv2.resize(blocks, size[::-1], interpolation=cv2.INTER_NEAREST)


SIZES = [((480, 854), (60, 106)), ((97, 61), (13, 8)), ((480, 480), (58, 43)), ((5, 7), (9, 11)), ((1, 3), (1, 1))]


class TestFirstLabels:
    @pytest.mark.parametrize(("size", "grid"), SIZES)
    def test_dino_is_pillows_nearest(self, size, grid):
        mask = id_mask(size)
        expected = np.asarray(Image.fromarray(mask).resize(grid[::-1], 0))
        ours = first_labels(torch.from_numpy(mask), grid, DINO, num_labels=4)
        assert np.array_equal(ours.argmax(0), expected) and torch.equal(ours.sum(0), torch.ones(grid))

    @pytest.mark.parametrize(("size", "grid"), SIZES)
    def test_dinov3_is_torchs_nearest_exact_of_the_one_hot(self, size, grid):
        mask = torch.from_numpy(id_mask(size))
        full = F.one_hot(mask.long(), 4).permute(2, 0, 1).float()
        expected = F.interpolate(full[None], grid, mode="nearest-exact")[0]
        assert torch.equal(first_labels(mask, grid, DINOV3, num_labels=4), expected)

    @pytest.mark.parametrize(("size", "grid"), SIZES)
    def test_crw_is_opencvs_bilinear_of_the_one_hot(self, size, grid):
        mask = id_mask(size)
        full = (mask[..., None] == np.arange(4)).astype(np.float32)
        expected = cv2.resize(full, grid[::-1], interpolation=cv2.INTER_LINEAR).reshape(*grid, 4).transpose(2, 0, 1)
        ours = first_labels(torch.from_numpy(mask), grid, CRW, num_labels=4)
        np.testing.assert_allclose(ours, expected, atol=1e-6)

    def test_an_object_between_the_cells_keeps_its_empty_channel(self):
        mask = torch.zeros(16, 16, dtype=torch.uint8)
        mask[0, 0] = 2
        for settings in (DINO, DINOV3):
            assert first_labels(mask, (2, 2), settings).sum((1, 2)).tolist() == [4, 0, 0]

    @pytest.mark.parametrize("settings", [CRW, DINO, DINOV3])
    @pytest.mark.parametrize(
        ("mask", "message"),
        [
            (torch.full((4, 4), 300), "id 300: ids must be 0 to 255; 0 is the background. Renumber"),
            (torch.full((4, 4), 256), "id 256"),
            (torch.full((4, 4), -1), "id -1"),
            (torch.full((4, 4), 5), "id 5: ids must be 0 to"),
            (torch.zeros(3, 4, 4), r"shape \(3, 4, 4\). Give one id"),
            (torch.zeros(0, 4), r"shape \(0, 4\)"),
        ],
    )
    def test_bad_masks(self, settings, mask, message):
        with pytest.raises(UserError, match=message):
            first_labels(mask, (2, 2), settings, num_labels=3 if "id 5" in message else None)


class TestToMask:
    def test_dinov3(self):
        soft = soft_labels(4, (5, 6))
        large = F.interpolate(soft[None], (31, 50), mode="nearest")[0].numpy()
        low, high = large.min((1, 2), keepdims=True), large.max((1, 2), keepdims=True)
        assert np.array_equal(to_mask(soft, (31, 50), DINOV3), ((large - low) / (high - low)).argmax(0))

    def test_dino(self):
        soft = soft_labels(4, (5, 6))
        soft[3] = 0
        large = cv2.resize(soft.permute(1, 2, 0).numpy(), (48, 40), interpolation=cv2.INTER_LINEAR).transpose(2, 0, 1)
        for channel in large[:3]:
            channel -= channel.min()
            channel /= channel.max()
        expected = np.asarray(Image.fromarray(large.argmax(0).astype(np.uint8)).resize((61, 43), 0))
        assert np.array_equal(to_mask(soft, (43, 61), DINO, patch_size=8), expected)

    def test_crw(self):
        soft = soft_labels(4, (5, 6))
        large = cv2.resize(soft.permute(1, 2, 0).numpy(), (61, 43), interpolation=cv2.INTER_LINEAR)
        assert np.array_equal(to_mask(soft, (43, 61), CRW), large.argmax(2))

    def test_the_stretch_changes_who_wins(self):
        soft = torch.tensor([[[0.9, 0.6]], [[0.1, 0.4]]])
        assert to_mask(soft, (1, 2), DINOV3).tolist() == [[0, 1]]
        assert to_mask(soft, (1, 2), CRW).tolist() == [[0, 0]]

    def test_constant_channels(self):
        gone = torch.stack([torch.ones(2, 2), torch.zeros(2, 2)])
        covered = gone.flip(0)
        for settings in (CRW, DINO, DINOV3):
            assert not to_mask(gone, (4, 4), settings, patch_size=2).any()
        assert to_mask(covered, (4, 4), DINO, patch_size=2).all()  # not a number beats all numbers there
        assert not to_mask(covered, (4, 4), DINOV3).any()  # and is 0 here, where the background comes first
        noisy = covered + torch.rand(2, 2, 2) * 1e-7
        assert (
            to_mask(noisy[1:].repeat(2, 1, 1).flip(0) * torch.tensor([0.0, 1.0])[:, None, None], (2, 2)).dtype
            is torch.uint8
        )

    def test_rounding_is_not_stretched(self):
        soft = torch.stack([torch.full((2, 2), 0.25), torch.full((2, 2), 0.75)])
        soft[1, 0, 0] += 6e-8
        assert soft[1, 0, 0] > 0.75
        assert not to_mask(soft, (2, 2), DINOV3).any()

    def test_errors(self):
        with pytest.raises(UserError, match="patch_bilinear needs the backbone's patch_size"):
            to_mask(torch.zeros(2, 2, 2), (4, 4), DINO)
        with pytest.raises(UserError, match="there are 257 labels"):
            to_mask(torch.zeros(257, 1, 1), (1, 1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context": 0}, "context=0 is out of range. Give a whole number of at least 1"),
        ({"context": 1.5}, "context=1.5 is of type float. Give a whole number"),
        ({"top_k": 0}, "top_k=0 is out of range"),
        ({"radius": -1}, "radius=-1 is out of range. Give"),
        ({"radius": math.nan}, "radius=nan"),
        ({"temperature": 0}, "temperature=0 is out of range. Give a number above 0"),
        ({"temperature": math.inf}, "temperature=inf"),
        ({"window": "disc"}, "window=disc is unknown. Choose one of circle, square"),
    ],
)
def test_bad_parameters_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        propagate(clip(2, 3, (4, 5)), torch.zeros(4, 5, dtype=torch.long), **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"first": "area"}, "first=area is unknown"),
        ({"upsample": "cubic"}, "upsample=cubic is unknown"),
        ({"min_max": "some"}, "min_max=some is unknown"),
        ({"radius": 0, "inclusive": False}, "radius=0 with inclusive=false leaves no cell"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        check_annotations(PropagationSettings)(**changes)


class TestBadInput:
    features = clip(3, 4, (5, 6))
    labels = soft_labels(2, (5, 6))

    @pytest.mark.parametrize(
        ("features", "labels", "message"),
        [
            (features, torch.zeros(2, 6, 5), r"shape \(2, 6, 5\), the features the grid \(5, 6\) .*first_labels"),
            (features, torch.zeros(4, 6, dtype=torch.long), r"shape \(4, 6\)"),
            (features, torch.zeros(1, 2, 5, 6), r"shape \(1, 2, 5, 6\)"),
            (features, torch.full((5, 6), 256), "id 256"),
            (features, {1: labels}, "The first frame has no labels. Give its mask"),
            (features * torch.inf, labels, "not finite, .* float32"),
            (features, {}, "The first frame has no labels"),
            (features, {0: labels, 3: labels}, "frame 3 of a clip of 3 frames"),
            (features, {0: labels, 2: labels[:, :4]}, r"shape \(2, 4, 6\)"),
            (features[:0], labels, "at least one frame"),
            (features[0], labels, r"\(T, C, h, w\)"),
        ],
    )
    def test_propagate(self, features, labels, message):
        with pytest.raises(UserError, match=message):
            propagate(features, labels)

    def test_frames_of_another_size_are_refused(self):
        propagator = Propagator()
        with pytest.raises(UserError, match=r"Give \(C, h, w\)"):
            propagator.step(self.features)
        propagator.step(self.features[0], self.labels)
        with pytest.raises(UserError, match=r"4 x 5 x 5, those of the first 4 x 5 x 6 \(C, h, w\). .* resize or split"):
            propagator.step(self.features[1, :, :, :5])

    def test_a_state_of_a_longer_context(self):
        long = Propagator()
        for number in range(3):
            long.step(self.features[number], self.labels if number == 0 else None)
        with pytest.raises(UserError, match="context=1, but the state holds 2 frames besides the first"):
            Propagator(PropagationSettings(context=1)).load(long.state())
