"""Counts and ratios derived from them; no torch.

They are counts of pixels of a reference and a prediction, exact in int64, or those of a metric as one array, in which
rows of images or videos are summed and left out.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np

from dinoseg.core.metric import Counts, Metric


def confusion(reference: np.ndarray, prediction: np.ndarray, size: int) -> np.ndarray:
    """Return counts (size, size) int64 of two maps of ids 0..size-1: rows are reference ids, columns predicted ones."""
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


def flatten_counts(counts: Counts) -> np.ndarray:
    """Return the counts of an image as one array (d,) in the type that holds all of them."""
    return np.concatenate([np.ravel(value) for value in counts.values()])


@dataclass(frozen=True)
class FlatMetric:
    """A metric as a function of flat sums (..., d), as `jackknife` takes it.

    Args:
        metric: the metric.
        shapes: shape of each of its counts, by name.
    """

    metric: Metric
    shapes: Mapping[str, tuple[int, ...]]
    highest: ClassVar[Mapping[str, float]] = {}

    @classmethod
    def of(cls, metric: Metric, counts: Counts) -> Self:
        """Return the function for a metric with the shapes of an image's counts."""
        return cls(metric, {name: np.shape(value) for name, value in counts.items()})

    @property
    def keys(self) -> Sequence[str]:
        """Return the names of the scores."""
        return [*self.metric.scores]

    @property
    def unbounded(self) -> Collection[str]:
        """Return the names of the scores that may lie outside 0..1."""
        return self.metric.unbounded

    @property
    def size(self) -> int:
        """Return d."""
        return sum(int(np.prod(shape)) for shape in self.shapes.values())

    def split(self, sums: np.ndarray) -> Counts:
        """Return the counts (..., *shape) by name, from flat sums (..., d)."""
        ends = np.cumsum([int(np.prod(shape)) for shape in self.shapes.values()])[:-1]
        parts = np.split(sums, ends, axis=-1)
        named = zip(self.shapes.items(), parts, strict=True)
        return {name: part.reshape((*sums.shape[:-1], *shape)) for (name, shape), part in named}

    def scores(self, sums: np.ndarray) -> dict[str, np.ndarray]:
        """Return each score (...) from flat sums (..., d); nan where undefined."""
        return self.metric.compute(self.split(sums))
