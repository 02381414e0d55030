"""ARI, FG-ARI and mBO of predicted segments, from the pixel counts that they share with true segments."""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from scipy.optimize import linear_sum_assignment

Matching = Literal["overlap", "hungarian"]
_DENSE = 2**20  # maximum cells of a table that is counted without sorting
_MAX = 2**63 - 1  # of int64, which encodes a pair of ids


@dataclass(frozen=True)
class Contingency:
    """Pixel counts shared by true and predicted segments.

    Args:
        true_ids: (R,) ascending, each with a pixel.
        predicted_ids: (C,) ascending, each with a pixel.
        counts: (R, C) int64.
    """

    true_ids: np.ndarray
    predicted_ids: np.ndarray
    counts: np.ndarray

    def __add__(self, other: "Contingency") -> "Contingency":
        """Return the summed counts of both tables, such as of two frames of one video."""
        true_ids = np.union1d(self.true_ids, other.true_ids)
        predicted_ids = np.union1d(self.predicted_ids, other.predicted_ids)
        counts = np.zeros((len(true_ids), len(predicted_ids)), dtype=np.int64)
        for one in (self, other):
            rows, columns = np.searchsorted(true_ids, one.true_ids), np.searchsorted(predicted_ids, one.predicted_ids)
            counts[rows[:, None], columns] += one.counts
        return Contingency(true_ids, predicted_ids, counts)

    def without(self, true_id: int) -> "Contingency":
        """Return the counts without one true segment, and without predicted segments that only overlap this one."""
        counts = self.counts[self.true_ids != true_id]
        held = counts.any(axis=0)
        return Contingency(self.true_ids[self.true_ids != true_id], self.predicted_ids[held], counts[:, held])


def contingency(true: np.ndarray, predicted: np.ndarray) -> Contingency:
    """Count the pixels of each pair of true and predicted ids.

    Both arrays have the same shape and any integer type; ids start at 0.

    Raises:
        ValueError: the shapes differ, or an id is negative or beyond int64.
    """
    if true.shape != predicted.shape:
        raise ValueError(
            f"The true ids have the shape {true.shape}, the predicted {predicted.shape}; they must be equal."
        )
    if true.size == 0:
        nothing = np.zeros(0, dtype=np.int64)
        return Contingency(nothing, nothing, np.zeros((0, 0), dtype=np.int64))
    if min(true.min(), predicted.min()) < 0:
        raise ValueError("Some ids are negative; ids must be at least 0.")
    height, width = int(true.max()) + 1, int(predicted.max()) + 1
    if max(height, width) > _MAX:
        raise ValueError(f"Some ids are larger than {_MAX - 1}, the largest allowed.")
    if height * width > _MAX:  # such as hashes: renumber the ids, since the keys below would overflow
        true_ids, true = np.unique(true.astype(np.int64), return_inverse=True)
        predicted_ids, predicted = np.unique(predicted.astype(np.int64), return_inverse=True)
        return replace(contingency(true, predicted), true_ids=true_ids, predicted_ids=predicted_ids)
    keys = true.reshape(-1).astype(np.int64) * width + predicted.reshape(-1).astype(np.int64)
    if height * width <= _DENSE:
        histogram = np.bincount(keys)
        cells = np.flatnonzero(histogram)
        sizes = histogram[cells]
    else:
        cells, sizes = np.unique(keys, return_counts=True)
    true_ids, rows = np.unique(cells // width, return_inverse=True)
    predicted_ids, columns = np.unique(cells % width, return_inverse=True)
    counts = np.zeros((len(true_ids), len(predicted_ids)), dtype=np.int64)
    counts[rows, columns] = sizes
    return Contingency(true_ids, predicted_ids, counts)


def adjusted_rand_index(counts: np.ndarray) -> float:
    """Return the ARI of a table (R, C) of pixel counts, exact but for one division; 1 where it is 0 / 0.

    Let s, a and b be the sums of n (n - 1) over cells, rows and columns. With the expected value
    e = a b / (N (N - 1)) of s, the ARI is (s - e) / ((a + b) / 2 - e). It is 0 / 0 without pixels, if all pixels are in
    one segment on both sides, or if each pixel is a segment on both.
    """
    cells, rows, columns, total = (
        _ordered_pairs(part) for part in (counts, counts.sum(axis=1), counts.sum(axis=0), counts.sum(keepdims=True))
    )
    both = 2 * rows * columns  # may exceed 64 bits: Python integers are exact
    divisor = (rows + columns) * total - both
    return (2 * cells * total - both) / divisor if divisor else 1.0


def best_overlaps(counts: np.ndarray, objects: np.ndarray, matching: Matching = "overlap") -> np.ndarray:
    """Return the IoU (n,) of each object with its predicted segment; the mean is mBO.

    Args:
        counts: (R, C) counts of all pixels, including the background's: these enlarge a segment.
        objects: (R,) bool, True for the n rows that are objects.
        matching: `overlap`: the segment with the greatest IoU, which may match several objects; `hungarian`: one
            to one with the greatest sum, 0 for unmatched objects.
    """
    union = counts.sum(axis=1, keepdims=True) + counts.sum(axis=0) - counts
    iou = np.divide(counts, union, out=np.zeros(counts.shape), where=union > 0)[objects]
    if matching == "overlap":
        return iou.max(axis=1, initial=0.0)
    best = np.zeros(len(iou))
    rows, columns = linear_sum_assignment(iou, maximize=True)
    best[rows] = iou[rows, columns]
    return best


def segment_scores(
    table: Contingency, *, background: int = 0, labelled_background: bool = True, matching: Matching = "overlap"
) -> tuple[float, float | None, float | None]:
    """Return ARI, FG-ARI (without the pixels of the true background) and mBO of a video or frame.

    Without objects, mBO is None. FG-ARI is then 1 if the background is labelled, as in MOVi, and None if its pixels
    have no label, as in YouTube-VIS (martius-lab/slotcontrast, slotcontrast/metrics.py).

    Raises:
        UserError: the matching is unknown.
    """
    overlaps = best_overlaps(table.counts, table.true_ids != background, matching)
    has_objects = len(overlaps) > 0
    foreground = None
    if has_objects or labelled_background:
        foreground = adjusted_rand_index(table.without(background).counts)
    return adjusted_rand_index(table.counts), foreground, float(overlaps.mean()) if has_objects else None


def _ordered_pairs(counts: np.ndarray) -> int:
    """Return the sum of n (n - 1) in Python integers: from n = 3,037,000,501, one product exceeds int64."""
    return sum(count * (count - 1) for count in counts[counts > 1].tolist())
