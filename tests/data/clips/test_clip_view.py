import cv2
import numpy as np
import pytest

from dinoseg.data.clips.view import ClipView
from dinoseg.utils.errors import UserError


def clip(size, length=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (length, *size, 3), dtype=np.uint8)


def places(size):
    """A clip whose pixels say where they are."""
    rows, columns = np.meshgrid(np.arange(size[0]), np.arange(size[1]), indexing="ij")
    return np.stack([np.stack([rows, columns, np.full(size, number)], -1) for number in range(2)]).astype(np.uint8)


@pytest.mark.parametrize("size", [(8, 8), (9, 20), (40, 13), (3, 2), (1, 1), (8, 100)])
def test_any_size_covers_the_crop_and_every_frame_is_cut_alike(size):
    view = ClipView((8, 8), scale=(1.0, 2.0), flip=0.5)
    frame = clip(size, 1)
    for seed in range(5):
        seen = view(np.repeat(frame, 3, axis=0), np.random.default_rng(seed))
        assert seen.shape == (3, 8, 8, 3) and (seen == seen[:1]).all()
        assert seen.flags.c_contiguous


def test_without_chance_it_is_the_middle():
    frames = clip((20, 40))
    seen = ClipView((10, 10), scale=(1.0, 3.0), flip=1.0)(frames)
    by_hand = [cv2.resize(frame, (20, 10), interpolation=cv2.INTER_AREA)[:, 5:15] for frame in frames]
    np.testing.assert_array_equal(seen, by_hand)


def test_a_frame_of_the_crop_s_own_size_stays_as_it_is():
    frames = clip((6, 9))
    np.testing.assert_array_equal(ClipView((6, 9))(frames, np.random.default_rng(1)), frames)


def test_crops_reach_every_place_and_are_mirrored_as_often_as_said():
    view, frames = ClipView((10, 10), flip=0.25), places((10, 30))
    lefts, mirrored = set(), 0
    for seed in range(400):
        seen = view(frames, np.random.default_rng(seed))
        columns = seen[0, 0, :, 1].astype(int)
        mirrored += columns[0] > columns[-1]
        lefts.add(min(columns))
        np.testing.assert_array_equal(np.sort(columns), np.arange(min(columns), min(columns) + 10))
        np.testing.assert_array_equal(seen[:, 0, 0, 2], [0, 1])
    assert lefts == set(range(21)) and 70 < mirrored < 130


def test_larger_than_need_be():
    view, frames = ClipView((8, 8), scale=(2.0, 2.0)), places((8, 8))
    seen = view(frames, np.random.default_rng(0)).astype(int)
    assert np.ptp(seen[0, :, 0, 0]) in (3, 4) and np.ptp(seen[0, 0, :, 1]) in (3, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop": [8]}, r"resolution\.crop=\[8\]"),
        ({"crop": [8, 0]}, r"each at least 1"),
        ({"crop": [8, 8], "scale": [0.5, 1]}, r"data\.view\.scale=\[0\.5, 1\]"),
        ({"crop": [8, 8], "scale": [2, 1]}, r"1 <= least <= largest"),
        ({"crop": [8, 8], "flip": 1.5}, r"data\.view\.flip=1\.5"),
    ],
)
def test_views_that_are_none(options, message):
    with pytest.raises(UserError, match=message):
        ClipView(**options)
