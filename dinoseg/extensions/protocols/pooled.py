"""Scores of metrics whose counts are pooled over all images, for protocols of any classes; no torch."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from dinoseg.core.metric import LabelledImage, Metric, PredictedImage
from dinoseg.metrics.counts import FlatMetric, flatten_counts

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
        self._metrics = [FlatMetric.of(metric, metric.count(PredictedImage(pixel), sample)) for metric in metrics]
        names = [name for metric in metrics for name in metric.scores]
        self.keys = [key for key, name in _SCORES.items() if name in names]

    def count(self, prediction: PredictedImage, sample: LabelledImage) -> np.ndarray:
        """Return the counts (d,) of an image."""
        return np.concatenate([flatten_counts(flat.metric.count(prediction, sample)) for flat in self._metrics])

    def scores(self, sums: np.ndarray) -> dict[str, np.ndarray]:
        """Return each key's score (...) from sums (..., d)."""
        found: dict[str, np.ndarray] = {}
        for flat, part in self._parts(sums):
            found |= flat.scores(part)
        return {key: found[_SCORES[key]] for key in self.keys}

    def per_class(self, sums: np.ndarray) -> list[dict[str, Any]]:
        """Return the scores of each class."""
        values: dict[str, np.ndarray] = {}
        for flat, part in self._parts(sums):
            values |= flat.metric.per_class(flat.split(part))
        shown = {key: values[name] for key, name in _CLASS_SCORES.items() if name in values}
        return [
            {"id": index, "name": name, **{key: float(each[index]) for key, each in shown.items()}}
            for index, name in enumerate(self._classes)
        ]

    def _parts(self, sums: np.ndarray) -> Iterator[tuple[FlatMetric, np.ndarray]]:
        """Yield each metric with its part of flat sums (..., d)."""
        start = 0
        for flat in self._metrics:
            yield flat, sums[..., start : start + flat.size]
            start += flat.size
