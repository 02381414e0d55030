"""Sums of pixel counts, and the ratios at their edges; tests of protocols compare them with their definitions."""

import subprocess
import sys
from fractions import Fraction

import numpy as np

from dinoseg.metrics.counts import class_counts, group_counts, iou, mean_defined, parts, ratio


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
    assert class_counts(np.empty(0, np.uint8), np.empty(0, np.uint8), 3).tolist() == [[0, 0, 0]] * 3
    assert np.isnan(mean_defined(np.full(3, np.nan))) and np.isnan(ratio(np.int64(0), np.int64(0)))


def test_protocols_import_no_heavy_dependency():
    protocols = ("idd_lite", "cityscapes", "ade20k", "semantic", "davis")
    names = ", ".join(f"dinoseg.metrics.protocols.{name}" for name in protocols)
    code = f"import sys, {names}; sys.exit(not sys.modules.keys().isdisjoint(['torch', 'hydra', 'scipy']))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
