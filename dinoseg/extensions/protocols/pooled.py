"""Scores of metrics whose counts are pooled over all images, for protocols of any classes; no torch."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from dinoseg.core.metric import Counts, LabelledImage, Metric, PredictedImage

# keys of the protocols, and names of the metrics' scores and values by class
_SCORES = {
    "mIoU": "miou",
    "accuracy": "accuracy",
    "mean_accuracy": "mean_accuracy",
    "dice": "dice",
    "boundary_IoU": "boundary_iou",
    "NSD": "nsd",
}
_CLASS_SCORES = {"IoU": "iou", "accuracy": "accuracy", "dice": "dice", "boundary_IoU": "boundary_iou", "NSD": "nsd"}


class PooledMetrics:
    """Metrics as functions of flat sums, one after another.

    Args:
        metrics: whose scores have keys here.
        classes: names of the K classes.
        pixel: a mask of one pixel, (1, 1) or (K, 1, 1), which shows the shapes of the counts.
    """

    def __init__(self, metrics: Sequence[Metric], classes: Sequence[str], pixel: np.ndarray) -> None:
        self._classes = classes
        sample = LabelledImage(pixel, len(classes))
        self._metrics = metrics
        self._shapes = [
            {name: np.shape(value) for name, value in metric.count(PredictedImage(pixel), sample).items()}
            for metric in metrics
        ]
        names = [name for metric in metrics for name in metric.scores]
        self.keys = [key for key, name in _SCORES.items() if name in names]

    def count(self, prediction: PredictedImage, sample: LabelledImage) -> np.ndarray:
        """Return the counts (d,) of an image."""
        counts = [metric.count(prediction, sample) for metric in self._metrics]
        return np.concatenate([np.ravel(value) for each in counts for value in each.values()])

    def scores(self, sums: np.ndarray) -> dict[str, np.ndarray]:
        """Return each key's score (...) from sums (..., d)."""
        found: dict[str, np.ndarray] = {}
        for metric, part in self._split(sums):
            found |= metric.compute(part)
        return {key: found[_SCORES[key]] for key in self.keys}

    def per_class(self, sums: np.ndarray) -> list[dict[str, Any]]:
        """Return the scores of each class."""
        values: dict[str, np.ndarray] = {}
        for metric, part in self._split(sums):
            values |= metric.per_class(part)
        shown = {key: values[name] for key, name in _CLASS_SCORES.items() if name in values}
        return [
            {"id": index, "name": name, **{key: float(each[index]) for key, each in shown.items()}}
            for index, name in enumerate(self._classes)
        ]

    def _split(self, sums: np.ndarray) -> Iterator[tuple[Metric, Counts]]:
        """Yield each metric with its counts (..., *shape) by name, from flat sums (..., d)."""
        start = 0
        for metric, shapes in zip(self._metrics, self._shapes, strict=True):
            counts = {}
            for name, shape in shapes.items():
                end = start + math.prod(shape)
                counts[name] = sums[..., start:end].reshape(*sums.shape[:-1], *shape)
                start = end
            yield metric, counts
