"""Masks as runs, compared with masks of pixels."""

import numpy as np
import pytest

from dinoseg.core.object_ids import encode_object
from dinoseg.core.objects import Objects, RunLengths


def draw_masks(seed):
    """Yield masks (H, W): none, all, a pixel, a row, a column, a border, noise."""
    rng = np.random.default_rng(seed)
    for _ in range(10):
        height, width = (int(side) for side in rng.integers(1, 9, 2))
        rows, columns = np.mgrid[:height, :width]
        row, column = int(rng.integers(height)), int(rng.integers(width))
        inside = (rows > 0) & (rows < height - 1) & (columns > 0) & (columns < width - 1)
        yield from (rows < 0, rows >= 0, (rows == row) & (columns == column), rows == row, columns == column, ~inside)
        yield rng.random((height, width)) < rng.choice([0.1, 0.5, 0.9])


@pytest.mark.parametrize("seed", range(5))
def test_runs_equal_masks(seed):
    rng = np.random.default_rng(seed)
    for mask in draw_masks(seed):
        runs = RunLengths.of_mask(mask)
        counts = runs.to_counts(mask.size)
        assert counts.sum() == mask.size and (counts[1:] > 0).all()
        empty = np.insert(counts, rng.integers(len(counts) + 1), [0, 0])  # counts of 0 are allowed
        for each in (runs, RunLengths.of_counts(counts), RunLengths.of_counts(empty)):
            assert np.array_equal(each.to_mask(mask.shape), mask) and each.area == mask.sum()
            canvas = np.zeros((*mask.shape, 2), int)
            each.paint(canvas, (7, 8))
            assert np.array_equal(canvas, mask[..., None] * [7, 8])
            rows, columns = np.nonzero(mask)
            box = [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1] if rows.size else [0] * 4
            assert Objects.of_runs(mask.shape, [each], [0]).boxes.tolist() == [box]


@pytest.mark.parametrize("values", [[0], [5], [0, 3], [0, 1, 2, 9]])
def test_runs_of_ids_equal_masks(values):
    rng = np.random.default_rng(0)
    for _ in range(30):
        ids = rng.choice(values, rng.integers(1, 7, 2)).astype(np.int32)
        found = RunLengths.of_ids(ids)
        assert [*found] == sorted({*ids.ravel().tolist()} - {0})
        for value, runs in found.items():
            assert np.array_equal(runs.to_mask(ids.shape), ids == value)
            assert np.array_equal(runs.starts, RunLengths.of_mask(ids == value).starts)


def test_objects_of_a_map_are_in_order_with_crowds_last():
    values = [encode_object(2, 1), encode_object(1, 7), encode_object(3, 0, crowd=True)]
    layers = np.array([[[values[2], values[0]]], [[values[1], 0]]], np.int32)
    objects = Objects.of_map(layers)
    assert objects.classes.tolist() == [7, 1, 0] and objects.crowds.tolist() == [False, False, True]
    assert [runs.to_mask((1, 2)).tolist() for runs in objects.masks] == [[[1, 0]], [[0, 1]], [[1, 0]]]
    assert not len(Objects.of_map(np.zeros((0, 3, 4), np.int32)))


@pytest.mark.parametrize("seed", range(5))
def test_union_of_runs_is_that_of_masks(seed):
    rng = np.random.default_rng(seed)
    for _ in range(40):
        masks = rng.random((rng.integers(5), *rng.integers(1, 9, 2))) < rng.choice([0, 0.1, 0.5, 0.9])
        united = RunLengths.union([RunLengths.of_mask(mask) for mask in masks])
        whole = RunLengths.of_mask(masks.any(axis=0))
        assert np.array_equal(united.starts, whole.starts) and np.array_equal(united.ends, whole.ends)


@pytest.mark.parametrize("seed", range(5))
def test_distinct_objects_are_those_of_a_count_by_pixels(seed):
    rng = np.random.default_rng(seed)
    left_out = 0
    for _ in range(40):
        count = rng.integers(9)
        masks = rng.random((count, *rng.integers(1, 7, 2))) < rng.choice([0, 0.4, 0.6])
        labels, scores = rng.integers(2, size=count), rng.choice([0.2, 0.5, 0.7, 0.9], count)
        kept = []
        for place in np.argsort(-scores, kind="stable"):
            better = [other for other in kept if labels[other] == labels[place]]
            common = masks[place] & masks[better].any(axis=0)
            if scores[place] >= 0.5 and 2 * common.sum() <= masks[place].sum():
                kept.append(place)
        found = Objects.of_masks(masks, labels, scores).select_distinct()
        drawn = [runs.to_mask(found.size) for runs in found.masks]
        assert len(drawn) == len(kept) and all(map(np.array_equal, drawn, masks[sorted(kept)]))
        assert np.array_equal(found.scores, scores[sorted(kept)])
        left_out += (scores >= 0.5).sum() - len(kept)
    assert left_out > 10
