"""Counts of pixels of a reference and a prediction, exact in int64, and ratios derived from them; no torch."""

from collections.abc import Sequence

import numpy as np


def confusion(reference: np.ndarray, prediction: np.ndarray, size: int) -> np.ndarray:
    """Return counts (size, size) int64 of two maps of ids 0..size-1: rows are reference ids, columns predicted ones."""
    # intp, since products of bytes would wrap around
    codes = np.multiply(reference, size, dtype=np.intp)
    codes += prediction
    return np.bincount(codes.ravel(), minlength=size * size).reshape(size, size)


def class_counts(reference: np.ndarray, prediction: np.ndarray, num_classes: int) -> np.ndarray:
    """Return true positives, false positives and false negatives (3, K) int64, with no pixel ignored.

    Reference ids are 0..K-1. A predicted id of K or more belongs to no class: it is a false negative of the
    reference's class.
    """
    counts = [
        np.bincount(ids, minlength=num_classes)[:num_classes]
        for ids in (reference[reference == prediction], prediction[prediction < num_classes], reference.ravel())
    ]
    hits, predicted, held = counts
    return np.stack([hits, predicted - hits, held - hits])


def parts(matrix: np.ndarray, scored: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return true positives, false positives and false negatives, each (..., K), of the scored ids of a matrix.

    Predictions are ignored where the reference's id is not scored. A predicted id that is not scored is a false
    negative where the reference's id is scored.

    Args:
        matrix: counts (..., N, N).
        scored: the K scored ids of the N ids.
    """
    rows = matrix[..., list(scored), :]
    block = rows[..., list(scored)]
    hits = np.diagonal(block, axis1=-2, axis2=-1)
    return hits, block.sum(-2) - hits, rows.sum(-1) - hits


def group_counts(matrix: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Return the counts (..., G, G) of a matrix (..., N, N) whose id i belongs to group `groups[i]`."""
    members = np.eye(int(groups.max()) + 1, dtype=matrix.dtype)[:, groups]  # (G, N)
    # M C M^T adds the rows and columns of the ids of each group
    return members @ matrix @ members.T


def ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Return part / whole in float64, nan where the whole is 0."""
    part, whole = np.broadcast_arrays(part, whole)
    return np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole != 0)


def iou(hits: np.ndarray, false_positives: np.ndarray, false_negatives: np.ndarray) -> np.ndarray:
    """Return intersection over union, nan where both sides are empty."""
    return ratio(hits, hits + false_positives + false_negatives)


def mean_defined(values: np.ndarray) -> np.ndarray:
    """Return the mean over the last axis, ignoring nan; nan if all entries are nan."""
    defined = ~np.isnan(values)
    return ratio(np.where(defined, values, 0.0).sum(-1), defined.sum(-1))
