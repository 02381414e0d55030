"""Counts of a metric as one array, in which rows of images or videos are summed and left out; no torch."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np

from dinoseg.core.metric import Counts, Metric


def flatten_counts(counts: Counts) -> np.ndarray:
    """Return the counts of an image as one array (d,) float64, which holds integers up to 2**53 exactly."""
    return np.concatenate([np.ravel(value) for value in counts.values()]).astype(np.float64)


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
