"""Pixel counts against scikit-learn, and the ratios at their edges."""

import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
from score_making import maps
from sklearn.metrics import confusion_matrix

from dinoseg.metrics.counts import class_counts, confusion, group_counts, iou, mean_defined, parts, ratio


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int64])
def test_confusion_equals_scikit_learn(dtype):
    rng = np.random.default_rng(0)
    assert confusion(np.zeros((3, 3), dtype), np.zeros((3, 3), dtype), 1).tolist() == [[9]]
    for size in (2, 27, 200):
        for reference, prediction in maps(rng, range(size)):
            ours = confusion(reference.astype(dtype), prediction.astype(dtype), size)
            assert ours.dtype == np.int64 and ours.sum() == reference.size
            theirs = confusion_matrix(reference.ravel(), prediction.ravel(), labels=range(size))
            np.testing.assert_array_equal(ours, theirs)


def test_class_counts_equal_the_confusion_matrix():
    rng = np.random.default_rng(1)
    for reference, prediction in maps(rng, range(6)):
        prediction = np.where(rng.random(prediction.shape) < 0.1, 9, prediction)
        hits, wrong, missed = class_counts(reference, prediction, 6)
        matrix = confusion_matrix(reference.ravel(), prediction.ravel(), labels=range(10))
        np.testing.assert_array_equal(hits, matrix.diagonal()[:6])
        np.testing.assert_array_equal(wrong, matrix.sum(0)[:6] - hits)
        np.testing.assert_array_equal(missed, matrix.sum(1)[:6] - hits)
    assert class_counts(np.empty(0, np.uint8), np.empty(0, np.uint8), 3).tolist() == [[0, 0, 0]] * 3


def test_parts_leave_out_rows_but_not_columns():
    matrix = np.arange(1, 26).reshape(5, 5)
    scored = [0, 2, 3]
    hits, wrong, missed = parts(matrix, scored)
    for place, label in enumerate(scored):
        others = [row for row in scored if row != label]
        assert hits[place] == matrix[label, label]
        assert wrong[place] == sum(matrix[row, label] for row in others)
        assert missed[place] == sum(matrix[label, column] for column in range(5) if column != label)


def test_grouped_sums_blocks_and_keeps_large_counts_exact():
    matrix = np.array([[2**60, 1, 2], [3, 2**60 + 1, 5], [7, 11, 13]])
    coarse = group_counts(np.stack([matrix, matrix * 0]), np.array([0, 0, 1]))
    assert coarse[0].tolist() == [[2**60 + 1 + 3 + 2**60 + 1, 7], [18, 13]] and not coarse[1].any()


def test_ratios_are_exact_and_undefined_ones_are_nan():
    hits, wrong, missed = np.array([3, 0, 0, 2**24 + 1]), np.array([1, 5, 0, 0]), np.array([2, 0, 0, 2])
    expected = [float(Fraction(3, 6)), 0.0, np.nan, float(Fraction(2**24 + 1, 2**24 + 3))]
    np.testing.assert_array_equal(iou(hits, wrong, missed), expected)
    assert mean_defined(np.array([[1.0, np.nan, 0.5], [np.nan] * 3]))[0] == 0.75
    assert np.isnan(mean_defined(np.full(3, np.nan))) and np.isnan(ratio(np.int64(0), np.int64(0)))


def test_protocols_import_no_heavy_dependency():
    names = ", ".join(
        f"dinoseg.metrics.protocols.{name}" for name in ("idd_lite", "cityscapes", "ade20k", "semantic", "davis")
    )
    code = f"import sys, {names}; sys.exit(not sys.modules.keys().isdisjoint(['torch', 'hydra', 'scipy']))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
