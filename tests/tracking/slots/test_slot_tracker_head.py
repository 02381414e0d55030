"""The tracker with the real slot head."""

import numpy as np
import pytest
import torch
from slot_scene import crossing_squares

from dinoseg.models.heads.slots.head import SlotHead
from dinoseg.models.model import SegmentationModel
from dinoseg.tracking.slots.settings import SlotTracking
from dinoseg.tracking.slots.tracker import SlotTracker

FRAMES, IDS = crossing_squares(5)
GROUPED = {"groups": "always", "num_slots": (2, 3)}
FIRST = [np.where(IDS[0] == 1, 1, 0), None, np.where(IDS[2] == 2, 8, 0), None, None]  # blue is told of later


@pytest.fixture
def make(tiny_backbone):
    """Return a function that builds a small segmenter with an untrained slot head."""

    def build(**kwargs):
        backbone = tiny_backbone()
        options = {
            "num_slots": 5,
            "slot_dim": 8,
            "hidden_dim": 16,
            "decoder_dim": 16,
            "positions_grid": (4, 6),
            **kwargs,
        }
        return SegmentationModel(backbone, SlotHead(backbone.dim, 1, **options)).eval()

    return build


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"predictor": "carry", "first_iterations": 3},
        {"mask_source": "alpha"},
        {"groups": "initial", "num_slots": (2, 3)},
        GROUPED,
    ],
)
@pytest.mark.parametrize("batch_size", [1, 3])
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


@pytest.mark.parametrize("kwargs", [{}, GROUPED])
def test_locked_slots_ignore_cells_of_others(make, kwargs):
    tracker = SlotTracker(make(**kwargs), SlotTracking(lock_on=True, slots_per_object=2, background_slots=3))
    frame, ids = (
        np.repeat(np.repeat(pixels[0], 2, axis=0), 2, axis=1) for pixels in (FRAMES, IDS)
    )  # squares of 4 cells
    mask = tracker.track([frame], [ids])[0]
    assert tracker.state()["masks"].shape[0] == 7
    assert np.array_equal(mask[3::8, 3::8], ids[3::8, 3::8])


def test_half_precision_follows_too(make):
    tracker = SlotTracker(make(), autocast=lambda: torch.autocast("cpu", torch.bfloat16))
    assert tracker.settings["precision"] == "bfloat16"
    masks = tracker.track(FRAMES, FIRST)
    exact = SlotTracker(make()).track(FRAMES, FIRST)
    assert tracker.state()["masks"].dtype == torch.float32
    assert (np.stack(masks) == np.stack(exact)).mean() > 0.8


def test_a_long_video_keeps_no_more_than_a_short_one(make):
    tracker = SlotTracker(make(predictor="none"), SlotTracking(match="similarity"), batch_size=8)
    held = []
    for _ in range(8):
        tracker.track(FRAMES * 5, [None] * 25)
        held.append({name: value.untyped_storage().nbytes() for name, value in tracker.state().items()})
    assert held[0] == held[-1]
    assert tracker.state()["path"].sum(1).tolist() == pytest.approx([1] * 5)


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
