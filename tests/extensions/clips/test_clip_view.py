import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mistakes import refusals

from dinoseg.extensions.clips.square import square_frame, square_mask
from dinoseg.extensions.clips.view import ClipView


def clip(size, length=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (length, *size, 3), dtype=np.uint8)


def places(size):
    """A clip whose pixels say where they are."""
    rows, columns = np.meshgrid(np.arange(size[0]), np.arange(size[1]), indexing="ij")
    return np.stack([np.stack([rows, columns, np.full(size, number)], -1) for number in range(2)]).astype(np.uint8)


@pytest.mark.parametrize("size", [(8, 8), (9, 20), (40, 13), (3, 2), (1, 1), (8, 100)])
def test_crop_fits_any_size_and_is_equal_for_all_frames(size):
    view = ClipView((8, 8), scale=(1.0, 2.0), flip=0.5)
    frame = clip(size, 1)
    for seed in range(5):
        seen = view(np.repeat(frame, 3, axis=0), np.random.default_rng(seed))
        assert seen.shape == (3, 8, 8, 3) and (seen == seen[:1]).all()
        assert seen.flags.c_contiguous


def test_view_without_randomness_is_centred():
    frames = clip((20, 40))
    seen = ClipView((10, 10), scale=(1.0, 3.0), flip=1.0)(frames)
    by_hand = [cv2.resize(frame, (20, 10), interpolation=cv2.INTER_AREA)[:, 5:15] for frame in frames]
    np.testing.assert_array_equal(seen, by_hand)
    np.testing.assert_array_equal(ClipView((20, 40))(frames, np.random.default_rng(1)), frames)


def test_crops_are_equally_likely_and_flips_match_their_rate():
    view = ClipView((10, 10), flip=0.25)
    frames = places((10, 12))
    lefts = []
    mirrored = 0
    for seed in range(1500):
        seen = view(frames, np.random.default_rng(seed))
        columns = seen[0, 0, :, 1].astype(int)
        mirrored += columns[0] > columns[-1]
        lefts.append(min(columns))
        np.testing.assert_array_equal(np.sort(columns), np.arange(lefts[-1], lefts[-1] + 10))
        np.testing.assert_array_equal(seen[:, 0, 0, 2], [0, 1])
    # rounding a uniform number would reach the first and the last position half as often as the middle one
    assert np.abs(np.bincount(lefts) / 1500 - 1 / 3).max() < 0.04 and abs(mirrored / 1500 - 0.25) < 0.04


def test_zoom_shows_only_a_part_of_a_clip():
    view = ClipView((8, 8), scale=(2.0, 2.0))
    frames = places((8, 8))
    seen = view(frames, np.random.default_rng(0)).astype(int)
    assert np.ptp(seen[0, :, 0, 0]) in (3, 4) and np.ptp(seen[0, 0, :, 1]) in (3, 4)


def bicubic(frame, size):
    """Interpolate in float64 by torch: the kernel of Keys (1981) with a = -0.75, borders repeated, no antialias."""
    pixels = torch.from_numpy(frame).permute(2, 0, 1)[None].double()
    return F.interpolate(pixels, size, mode="bicubic")[0].permute(1, 2, 0).clamp(0, 255).numpy()


@pytest.mark.parametrize("size", [(20, 41), (7, 9), (33, 12), (10, 10), (5, 5)])
def test_clip_view_resizes_bicubically_and_crops_the_centre(size):
    frames = clip(size, seed=size[0])
    seen = ClipView((10, 10), resample="bicubic")(frames)
    short = min(size)
    wanted = tuple(10 if side == short else side * 10 // short for side in size)
    top, left = round((wanted[0] - 10) / 2), round((wanted[1] - 10) / 2)
    expected = bicubic(frames[0], wanted)[top : top + 10, left : left + 10]
    assert np.abs(seen[0] - expected).max() <= 0.51
    corner = [round((side - short) / 2) for side in size]
    middle = frames[0][corner[0] : corner[0] + short, corner[1] : corner[1] + short]
    assert np.abs(square_frame(frames[0], 13) - bicubic(middle, (13, 13))).max() <= 0.51
    nearest = [int((place + 0.5) * short / 13) for place in range(13)]
    np.testing.assert_array_equal(square_mask(frames[0, ..., 0], 13), middle[nearest][:, nearest, 0])


test_message_names_value_and_remedy = refusals(
    {
        "scale below 1": (lambda: ClipView([8, 8], scale=[0.5, 1]), "scale=[0.5, 1]"),
        "scale upside down": (lambda: ClipView([8, 8], scale=[2, 1]), "1 <= least <= largest"),
    }
)
