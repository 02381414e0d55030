"""Units of confidence intervals: groups of images or videos that vary independently; no torch."""

from collections.abc import Sequence

import numpy as np


def unit_sums(counts: np.ndarray, units: Sequence[str]) -> np.ndarray:
    """Return the sums (U, d) of counts (N, ...) by unit, in the order in which the units first occur."""
    places = {unit: index for index, unit in enumerate(dict.fromkeys(units))}
    sums = np.zeros((len(places), *counts.shape[1:]), counts.dtype)
    np.add.at(sums, [places[unit] for unit in units], counts)
    return sums.reshape(len(places), -1)


def scored_sums(counts: np.ndarray, units: Sequence[str]) -> np.ndarray:
    """Return the sums (U, d) of counts (N, ...) by unit, as `unit_sums` does, of those units that have a count."""
    sums = unit_sums(counts, units)
    return sums[has_labels(sums)]


def has_labels(sums: np.ndarray) -> np.ndarray:
    """Return which units (U,) have a count in their sums (U, d).

    The others, such as a video without a labelled pixel, say nothing about a score. Counted as units, they would make
    its interval too narrow.
    """
    return np.any(sums, axis=1)
