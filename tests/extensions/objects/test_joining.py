"""Objects of overlapping windows: each object of the image exactly once."""

import itertools

import numpy as np
import pytest

from dinoseg.core.objects import Objects, RunLengths
from dinoseg.extensions.objects.joining import join_instances, join_segments, place_runs

SIZE, WINDOW = (60, 90), (36, 40)
STARTS = (0, 24), (0, 25, 50)  # two borders between windows across, one down


def draw_objects(rng, count, *, overlapping=False):
    """Return masks (N, H, W) of ellipses and rectangles of at least 12 pixels, and their classes."""
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
    masks = []
    taken = np.zeros(SIZE, bool)
    while len(masks) < count:
        middle, reach = rng.uniform((0, 0), SIZE), rng.uniform((2, 2), (14, 25))
        distance = np.abs([rows - middle[0], columns - middle[1]]) / reach[:, None, None]
        mask = (distance.max(axis=0) if rng.random() < 0.3 else np.square(distance).sum(axis=0)) < 1
        if not overlapping:
            mask &= ~taken
        if mask.sum() >= 12 and is_connected(mask):
            masks.append(mask)
            taken |= mask
    return np.array(masks), rng.integers(0, 2, count)


def is_connected(mask):
    import cv2

    return cv2.connectedComponents(mask.view(np.uint8), connectivity=4)[0] == 2


def cut(masks, classes, rng, *, noise=0.0):
    """Return what each window sees of objects, whose border pixels may be wrong."""
    parts = []
    for top, left in itertools.product(*STARTS):
        seen = masks[:, top : top + WINDOW[0], left : left + WINDOW[1]]
        found = np.array([spoil(mask, rng, noise) for mask in seen]).reshape(-1, *WINDOW)
        held = np.flatnonzero(found.any(axis=(1, 2)))
        scores = rng.uniform(0.5, 1, len(held))
        order = np.argsort(-scores)
        found = found[held]
        parts.append((Objects.of_masks(found[order], classes[held][order], scores[order]), top, left))
    return parts


def spoil(mask, rng, noise):
    border = mask & ~(np.roll(mask, 1, 0) & np.roll(mask, -1, 0) & np.roll(mask, 1, 1) & np.roll(mask, -1, 1))
    return mask & ~(border & (rng.random(mask.shape) < noise))


def as_set(objects):
    return sorted(
        (int(label), mask.to_mask(SIZE).tobytes()) for label, mask in zip(objects.classes, objects.masks, strict=True)
    )


@pytest.mark.parametrize("chunk", range(4))
def test_windows_find_each_object_once(chunk):
    for seed in range(50 * chunk, 50 * chunk + 50):
        rng = np.random.default_rng(seed)
        masks, classes = draw_objects(rng, int(rng.integers(1, 8)))
        expected = as_set(Objects.of_masks(masks, classes))
        parts = cut(masks, classes, rng)
        assert as_set(join_instances(parts, SIZE)) == expected, seed
        assert as_set(join_segments(parts, SIZE, {0, 1})) == expected, seed


def test_windows_that_differ_at_borders_join_objects():
    for seed in range(100):
        rng = np.random.default_rng(seed)
        masks, classes = draw_objects(rng, 5)
        joined = join_instances(cut(masks, classes, rng, noise=0.2), SIZE)
        # slivers at the border of a window, of which each window sees other pixels, may stay apart
        found = [mask for mask in decode(joined) if mask.sum() > 8]
        ious = [max((mask & own).sum() / (mask | own).sum() for own in masks) for mask in found]
        assert len(found) == 5 and min(ious) > 0.5, seed


def decode(objects):
    return [mask.to_mask(SIZE) for mask in objects.masks]


def test_segments_of_windows_never_overlap():
    for seed in range(60):
        rng = np.random.default_rng(seed)
        masks, classes = draw_objects(rng, 4)
        parts = cut(masks, classes, rng, noise=0.5)
        joined = join_segments(parts, SIZE, {1})
        total = np.sum(decode(joined), axis=0)
        assert total.max() <= 1
        stuff = joined.classes[joined.classes == 0]
        assert len(stuff) <= 1
        seen = np.sum([place_runs(mask, WINDOW[0], SIZE, top, left).to_mask(SIZE) for part, top, left in parts
                       for mask in part.masks], axis=0)  # fmt: skip
        assert np.array_equal(total > 0, seen > 0)


def test_object_in_the_common_band_appears_once():
    mask = np.zeros((1, *SIZE), bool)
    mask[0, 26:34, 27:38] = True  # seen by four windows
    parts = cut(mask, np.array([1]), np.random.default_rng(0))
    assert sum(len(part) for part, _, _ in parts) == 4
    joined = join_instances(parts, SIZE)
    assert len(joined) == 1
    assert joined.scores[0] == pytest.approx(np.mean([part.scores[0] for part, _, _ in parts if len(part)]))


def test_score_is_the_mean_by_area():
    mask = np.zeros((1, *SIZE), bool)
    mask[0, 0:10, 20:60] = True
    parts = cut(mask, np.array([0]), np.random.default_rng(0))
    areas = [part.areas[0] for part, _, _ in parts if len(part)]
    scores = [part.scores[0] for part, _, _ in parts if len(part)]
    assert join_instances(parts, SIZE).scores[0] == pytest.approx(np.dot(areas, scores) / np.sum(areas))


def test_objects_of_other_classes_stay_apart():
    mask = np.ones((1, 4, 8), bool)
    parts = [(Objects.of_masks(mask, [0], [0.9]), 0, 0), (Objects.of_masks(mask, [1], [0.8]), 0, 4)]
    assert join_instances(parts, (4, 12)).classes.tolist() == [0, 1]


def test_no_objects_join_to_none():
    empty = Objects.of_masks(np.zeros((0, 4, 8), bool), [], [])
    assert not len(join_instances([(empty, 0, 0), (empty, 0, 4)], (4, 12)))
    assert not len(join_segments([(empty, 0, 0), (empty, 0, 4)], (4, 12), {0}))


def test_union_and_place_equal_masks():
    rng = np.random.default_rng(0)
    for _ in range(300):
        height, width = (int(each) for each in rng.integers(1, 7, 2))
        masks = rng.random((int(rng.integers(0, 4)), height, width)) < rng.choice([0, 0.3, 0.8, 1])
        runs = [RunLengths.of_mask(mask) for mask in masks]
        union = RunLengths.union(runs)
        assert np.array_equal(union.to_mask((height, width)), masks.any(axis=0))
        assert np.array_equal(union.starts, RunLengths.of_mask(masks.any(axis=0)).starts)
        top, left, *more = (int(each) for each in rng.integers(0, 4, 4))
        size = (height + top + more[0], width + left + more[1])
        whole = np.zeros(size, bool)
        whole[top : top + height, left : left + width] = masks.any(axis=0)
        placed = place_runs(union, height, size, top, left)
        expected = RunLengths.of_mask(whole)
        assert np.array_equal(placed.starts, expected.starts) and np.array_equal(placed.ends, expected.ends)
