"""Sums of pixel counts that float64 cannot hold, and imports; protocols compare counts with their definitions."""

import subprocess
import sys

import numpy as np

from dinoseg.metrics.counts import group_counts


def test_grouped_sums_blocks_and_keeps_large_counts_exact():
    matrix = np.array([[2**60, 1, 2], [3, 2**60 + 1, 5], [7, 11, 13]])
    coarse = group_counts(np.stack([matrix, matrix * 0]), np.array([0, 0, 1]))
    assert coarse[0].tolist() == [[2**60 + 1 + 3 + 2**60 + 1, 7], [18, 13]] and not coarse[1].any()


def test_protocols_import_no_heavy_dependency():
    protocols = ("idd_lite", "cityscapes", "ade20k", "semantic", "davis")
    names = ", ".join(f"dinoseg.metrics.protocols.{name}" for name in protocols)
    code = f"import sys, {names}; sys.exit(not sys.modules.keys().isdisjoint(['torch', 'hydra', 'scipy']))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
