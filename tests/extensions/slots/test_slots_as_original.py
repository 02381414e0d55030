"""The tracker with the real slot head; what slots see and how they are followed is DINOSAVi's, by its formulas."""

from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from slot_scene import crossing_squares

from dinoseg.extensions.slots.head.head import SlotHead
from dinoseg.extensions.slots.tracker import matching as slot_matching
from dinoseg.extensions.slots.tracker.propagation import SlotPropagator
from dinoseg.extensions.slots.tracker.settings import SlotTracking
from dinoseg.extensions.slots.tracker.tracker import SlotTracker
from dinoseg.models.model import SegmentationModel

FRAMES, SQUARES = crossing_squares(5)
IDS = np.zeros((32, 48), np.uint8)  # of whole cells of 8 px
IDS[8:24, 8:24], IDS[0:8, 32:48] = 1, 2
GROUPED = {"groups": "always", "num_slots": (2, 3)}
FIRST = [np.where(SQUARES[0] == 1, 1, 0), None, np.where(SQUARES[2] == 2, 8, 0), None, None]  # blue is told of later


@pytest.fixture
def make(tiny_backbone):
    """Return a function that builds a small segmenter with an untrained slot head."""

    def build(**kwargs):
        backbone = tiny_backbone()
        options = {"slot_dim": 8, "hidden_dim": 16, "decoder_dim": 16, "num_slots": 5, "positions_grid": (4, 6)}
        return SegmentationModel(backbone, SlotHead(backbone.dim, 1, **options | kwargs)).eval()

    return build


def spy_on_tracker(model, settings, labels=None):
    """Return (allowed, soft masks) of each frame, and the places of its slots."""
    seen = []
    step = model.head.step
    masks = model.head.masks

    def spy_step(features, slots, allowed, sizes):
        seen.append([None if allowed is None else allowed[0].numpy()])
        return step(features, slots, allowed, sizes)

    def spy_masks(slots, attention, grid):
        seen[-1].append(masks(slots, attention, grid)[0].double().numpy())
        return masks(slots, attention, grid)

    model.head.step, model.head.masks = spy_step, spy_masks
    tracker = SlotTracker(model, settings, batch_size=3)
    places = []
    for number, frame in enumerate(FRAMES):
        tracker.track([frame], [labels if number == 0 else None])
        places.append(tracker.state()["successors"].numpy())
    return seen, places


def background_of(model):
    """(T, h, w): where the heads' mean, weighted by how few cells each looks at, is below its mean."""
    images = torch.from_numpy(np.stack(FRAMES)).permute(0, 3, 1, 2)
    with torch.no_grad():
        attention = model.backbone.with_class_attention(model.pixels(images))[1].double().numpy()
    found = []
    for heads in attention:
        counts = [max(1, int((head > heads.mean()).sum())) for head in heads]
        weighted = sum(head * np.log(sum(counts) / count) for head, count in zip(heads, counts, strict=True))
        found.append(weighted / len(heads) < (weighted / len(heads)).mean())
    return np.array(found)


def same(allowed, expected):
    """Whether two masks (S, h, w) are equal; None: all slots see all."""
    return np.array_equal(np.ones_like(expected) if allowed is None else allowed, expected)


def test_background_slots_are_limited_to_the_background(make):
    model = make(**GROUPED)
    background = background_of(model)
    assert 0 < background.mean() < 1
    seen, _ = spy_on_tracker(model, SlotTracking())
    for (allowed, _), behind in zip(seen, background, strict=True):
        assert same(allowed, np.stack([behind, behind, *[np.ones_like(behind)] * 3]))


def test_groups_can_be_held_as_they_are_trained_or_not_at_all(make):
    model = make(**GROUPED)
    background = background_of(model)
    both, none = (spy_on_tracker(make(**GROUPED), SlotTracking(hold=side))[0] for side in ("both", "none"))
    for (held, _), (free, _), behind in zip(both, none, background, strict=True):
        assert same(held, np.stack([behind] * 2 + [~behind] * 3)) and free is None


@pytest.mark.parametrize(("num_extra", "kwargs"), [(0, {}), (2, {}), (2, GROUPED)])
def test_locked_slots_start_at_labels_and_hold_the_background(make, num_extra, kwargs):
    model = make(**kwargs)
    settings = SlotTracking(lock_on=True, background_slots=3, slots_per_object=2, extra_slots=num_extra)
    background = background_of(model)
    cells = IDS[4::8, 4::8]
    seen, _ = spy_on_tracker(model, settings, IDS)
    extra = (cells == 0) & ~background[0]  # the labels call it background, the class token looks at it
    assert extra.any()
    first = np.stack([cells == 0] * 3 + [cells == 1] * 2 + [cells == 2] * 2 + [extra] * num_extra)
    assert same(seen[0][0], first)
    for (allowed, _), behind in zip(seen[1:], background[1:], strict=True):
        assert same(allowed, np.stack([behind] * 3 + [np.ones_like(behind)] * (4 + num_extra)))


def overlaps(one, other):
    """(S, S): sum of products over sum of maxima, of every slot of one frame with every slot of another."""
    pairs = [[(a * b).sum() / np.maximum(a, b).sum() for b in other] for a in one]
    return np.array(pairs)


def test_overlap_matching_uses_the_ratio_of_products_to_maxima(make):
    seen, places = spy_on_tracker(make(predictor="none", num_slots=16), SlotTracking(match="overlap"))
    path = np.eye(16)
    for (one, other), found in zip(pairwise(masks for _, masks in seen), places[1:], strict=True):
        edges = np.exp(overlaps(one, other) / 0.05)
        path = path @ (edges / edges.sum(axis=1, keepdims=True))
        assert found.tolist() == linear_sum_assignment(path, maximize=True)[1].tolist()


def test_overlap_is_the_original_s_and_soft_iou_another():
    draw = torch.Generator().manual_seed(0)
    one, other = torch.rand(3, 5, 7, generator=draw), torch.rand(4, 5, 7, generator=draw)
    a = one.double().numpy()
    b = other.double().numpy()
    np.testing.assert_allclose(slot_matching.overlap(one, other).numpy(), overlaps(a, b), rtol=1e-6)
    assert not np.allclose(slot_matching.soft_iou(one, other).numpy(), overlaps(a, b), rtol=0.05)
    hard = (one > 0.5).float()
    torch.testing.assert_close(slot_matching.overlap(hard, hard), slot_matching.soft_iou(hard, hard))
    assert not slot_matching.overlap(torch.zeros(1, 3, 3), torch.zeros(2, 3, 3)).any()


@pytest.mark.parametrize(
    ("groups", "settings", "first", "later"),
    [
        ("off", {}, False, False),
        ("off", {"lock_on": True}, False, True),
        ("off", {"lock_on": True, "hold": "none"}, False, False),
        ("off", {"lock_on": True, "hold": "none", "extra_slots": 1}, True, False),
        ("first", {}, True, False),
        ("always", {}, True, True),
        ("always", {"hold": "none"}, False, False),
    ],
)
def test_class_attention_is_requested_only_where_needed(groups, settings, first, later):
    propagator = SlotPropagator(SimpleNamespace(groups=groups), SlotTracking(**settings))
    assert (propagator.needs_background(first=True), propagator.needs_background(first=False)) == (first, later)


@pytest.mark.parametrize(
    ("kwargs", "batch_size"),
    [
        ({}, 1),
        ({"predictor": "carry", "first_iterations": 3}, 3),
        ({"mask_source": "alpha"}, 1),
        ({"groups": "initial", "num_slots": (2, 3)}, 3),
        (GROUPED, 1),
        (GROUPED, 3),
    ],
)
def test_without_labels_masks_are_those_of_the_head_on_the_clip(make, kwargs, batch_size):
    model = make(**kwargs)
    clip = torch.from_numpy(np.stack(FRAMES)).permute(0, 3, 1, 2)[None]  # (1, T, 3, H, W)
    with torch.no_grad():
        expected = model(clip).scores().argmax(1).numpy() + 1
    trained = SlotTracking(hold="both")  # as the head does with groups
    masks = np.stack(SlotTracker(model, trained, batch_size=batch_size).track(FRAMES, [None] * 5))
    assert (masks == expected).mean() > 0.999 and len(np.unique(masks)) > 1


@pytest.mark.parametrize("kwargs", [{}, GROUPED, {"predictor": "none"}, {"mask_source": "alpha"}])
@pytest.mark.parametrize("lock_on", [False, True])
def test_labels_are_followed_and_a_restart_changes_nothing(make, kwargs, lock_on):
    settings = SlotTracking(lock_on=lock_on, background_slots=3, extra_slots=2 * lock_on, match="overlap")
    model = make(**kwargs)
    whole = SlotTracker(model, settings, batch_size=5).track(FRAMES, FIRST)
    assert set(np.unique(whole)) <= {0, 1, 8} and not any((mask == 8).any() for mask in whole[:2])
    before, after = SlotTracker(model, settings), SlotTracker(model, settings)
    masks = before.track(FRAMES[:3], FIRST[:3])
    after.load(before.state())
    masks += after.track(FRAMES[3:], FIRST[3:])
    assert (np.stack(masks) == np.stack(whole)).mean() > 0.999


def test_half_precision_follows_too(make):
    tracker = SlotTracker(make(), autocast=lambda: torch.autocast("cpu", torch.bfloat16))
    assert tracker.settings["precision"] == "bfloat16"
    masks = tracker.track(FRAMES, FIRST)
    exact = SlotTracker(make()).track(FRAMES, FIRST)
    assert tracker.state()["masks"].dtype == torch.float32
    assert (np.stack(masks) == np.stack(exact)).mean() > 0.8


@pytest.mark.gpu
@pytest.mark.parametrize("kwargs", [{}, GROUPED, {"predictor": "none"}])
@pytest.mark.parametrize("lock_on", [False, True])
def test_masks_on_a_gpu_are_those_on_the_cpu(make, kwargs, lock_on):
    settings = SlotTracking(lock_on=lock_on, extra_slots=2 * lock_on, match="overlap")
    expected = SlotTracker(make(**kwargs), settings).track(FRAMES, FIRST)
    tracker = SlotTracker(make(**kwargs).cuda(), settings)
    masks = tracker.track(FRAMES[:3], FIRST[:3])
    tracker.load({name: value.cpu() for name, value in tracker.state().items()})
    masks += tracker.track(FRAMES[3:], FIRST[3:])
    assert (np.stack(masks) == np.stack(expected)).mean() > 0.99
