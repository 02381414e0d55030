"""Chosen thresholds: equal to a search of all of them on drawn counts, ties and absent classes."""

import numpy as np
import pytest
from plain_precision import search_threshold

from dinoseg.core.metric import BINS
from dinoseg.extensions.thresholds.choice import choose_thresholds


def draw_counts(seed):
    """Return positive and all pixels (K, 1024) by bin: dense, sparse, in one bin, or without a positive."""
    rng = np.random.default_rng(seed)
    num_classes = int(rng.integers(1, 5))
    totals = rng.poisson(rng.choice([0.002, 0.05, 3]), (num_classes, BINS))
    positives = rng.binomial(totals, rng.random((num_classes, 1)) * np.linspace(0, 1, BINS) ** rng.integers(0, 3))
    if rng.random() < 0.2:
        place = rng.integers(0, BINS)
        totals[0], positives[0] = 0, 0
        totals[0, place], positives[0, place] = rng.integers(1, 9), rng.integers(0, 2)
    if rng.random() < 0.2:
        positives[-1] = 0
    return positives, totals


@pytest.mark.parametrize("start", range(0, 200, 50))
def test_thresholds_equal_a_search_of_all(start):
    for seed in range(start, start + 50):
        positives, totals = draw_counts(seed)
        beta = (1, 1, 2, 0.5)[seed % 4]
        rows = zip(positives.tolist(), totals.tolist(), strict=True)
        assert choose_thresholds(positives, totals, beta) == [search_threshold(*row, beta) for row in rows]


def test_separated_classes_get_the_middle_between_them():
    positives, totals = np.zeros((2, 3, BINS), np.int64)
    totals[:, 100], totals[:2, 901] = 50, 30
    positives[0, 901], positives[1, 100] = 30, 1
    assert choose_thresholds(positives, totals) == [501 / BINS, 50 / BINS, 0.5]


def test_counts_of_images_are_summed_by_the_caller():
    counts = [draw_counts(seed) for seed in range(300)]
    counts = [pair for pair in counts if len(pair[0]) == 2][:20]
    positives, totals = (sum(part) for part in zip(*counts, strict=True))
    assert all(1 / BINS <= value <= 1 - 1 / BINS for value in choose_thresholds(positives, totals))
