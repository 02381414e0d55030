import numpy as np
import pytest
import torch
from torch import nn

from dinoseg.core.contracts import Backbone
from dinoseg.tasks.preparation.pseudo_labels import agree, between
from dinoseg.tracking.propagation.settings import CRW, DINO, DINOV3, PropagationSettings
from dinoseg.tracking.propagation.tracker import PropagationTracker

PLAIN = PropagationSettings(short_side=None, radius=3)
VOID = 255


class Colours(Backbone):
    """A backbone whose map is the mean colour of each patch, and one constant."""

    patch_size, num_layers, dim = 4, 1, 4

    def forward(self, images):
        colours = nn.functional.avg_pool2d(images, 4)
        return [torch.cat([colours, torch.full_like(colours[:, :1], 0.3)], dim=1)]


def clip(count=6, step=4):
    """Return frames of a red and a blue square, the red one moving, and their masks: 0, 3 (red) and 7 (blue)."""
    frames, masks = [], []
    for number in range(count):
        mask = np.zeros((32, 48), np.uint8)
        mask[4:12, 4 + step * number : 12 + step * number] = 3
        mask[20:28, 24:40] = 7
        frame = np.full((32, 48, 3), 40, np.uint8)
        frame[mask == 3], frame[mask == 7] = (220, 30, 30), (30, 30, 220)
        frames.append(frame)
        masks.append(mask)
    return frames, masks


def features_of(frames):
    pixels = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).float() / 255
    return Colours()(pixels)[0]


def by_pixel(one, other, void):
    """Return mask and agreement pixel by pixel."""
    mask, same, found = np.full(one.shape, void), 0, 0
    for place in np.ndindex(*one.shape):
        here, there = int(one[place]), int(other[place])
        if here == there:
            mask[place] = here
        if void not in (here, there) and (here, there) != (0, 0):
            found += 1
            same += here == there
    return mask, same / found if found else 1.0


@pytest.mark.parametrize("void", [255, 2])
def test_agreement_is_that_of_pixels(void):
    draw = np.random.default_rng(0)
    for classes in (1, 2, 4):
        for _ in range(5):
            one, other = draw.choice([*range(classes), void], (2, 7, 9)).astype(np.uint8)
            mask, share = agree(one, other, void)
            expected = by_pixel(one, other, void)
            np.testing.assert_array_equal(mask, expected[0])
            assert mask.dtype == np.uint8 and share == pytest.approx(expected[1])
    empty = np.zeros((3, 3), np.uint8)
    assert agree(empty, empty).agreement == 1.0 and agree(empty, empty + 1).agreement == 0.0
    assert (agree(empty, empty + 1).mask == VOID).all()


@pytest.mark.parametrize(
    "settings",
    [PLAIN, PropagationSettings(short_side=None), PropagationSettings(short_side=None, context=1, radius=2, top_k=2)],
)
def test_objects_that_both_ways_follow_keep_their_class(settings):
    frames, masks = clip()
    found = list(between(features_of(frames), masks[0], masks[-1], settings, patch_size=4))
    assert len(found) == 4
    for (mask, agreement), truth in zip(found, masks[1:-1], strict=True):
        np.testing.assert_array_equal(mask, truth)
        assert agreement == 1.0 and mask.dtype == np.uint8


@pytest.mark.parametrize("settings", [PLAIN, DINO, CRW, DINOV3])
def test_both_ways_are_those_of_a_tracker(settings):
    draw = np.random.default_rng(1)
    frames, masks = clip(7, 3)
    frames = [(frame + draw.integers(0, 20, frame.shape)).astype(np.uint8) for frame in frames]
    settings = PropagationSettings(**{**vars(settings), "short_side": None, "long_multiple": None, "radius": 2})
    ways = []
    for order in (slice(None), slice(None, None, -1)):
        tracker, ends = PropagationTracker(Colours(), settings), masks[order]
        ways.append(tracker.track(frames[order], [ends[0], *[None] * 6])[order])
    found = list(between(features_of(frames), masks[0], masks[-1], settings, patch_size=4))
    for number, (mask, agreement) in enumerate(found, start=1):
        expected = by_pixel(ways[0][number], ways[1][number], VOID)
        np.testing.assert_array_equal(mask, expected[0])
        assert agreement == pytest.approx(expected[1])
    assert len(found) == 5 and any(0 < agreement < 1 for _, agreement in found)


def test_what_only_one_mask_shows_is_ignored():
    frames, masks = clip(4)
    last = masks[-1].copy()
    last[last == 7] = 0
    for mask, agreement in between(features_of(frames), masks[0], last, PLAIN, patch_size=4):
        assert (mask[20:28, 24:40] == VOID).all() and (mask == VOID).sum() == 128
        assert agreement == pytest.approx(64 / (64 + 128))


@pytest.mark.parametrize("void", [255, 9])
def test_what_a_mask_ignores_stays_ignored(void):
    frames, masks = clip(4)
    first = np.where(masks[0] == 7, void, masks[0]).astype(np.uint8)
    for mask, agreement in between(features_of(frames), first, masks[-1], PLAIN, patch_size=4, ignore_index=void):
        assert (mask[20:28, 24:40] == void).all() and (mask == void).sum() == 128
        assert agreement == 1.0
    hidden = np.full_like(first, void)
    found = list(between(features_of(frames), hidden, hidden, PLAIN, patch_size=4, ignore_index=void))
    assert all((mask == void).all() and agreement == 1.0 for mask, agreement in found)


def test_two_frames_have_none_between_them():
    frames, masks = clip(2)
    assert list(between(features_of(frames), masks[0], masks[1], PLAIN, patch_size=4)) == []
