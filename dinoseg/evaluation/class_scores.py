"""Class scores as functions of sums over units, so that leaving out units gives their confidence intervals."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from dinoseg.core.metric import Counts, Metric
from dinoseg.evaluation.scoring.intervals import jackknife
from dinoseg.evaluation.scoring.units import scored_sums
from dinoseg.metrics.counts import mean_defined
from dinoseg.metrics.flat import FlatMetric, flatten_counts
from dinoseg.metrics.miou import MeanIoU


@dataclass(frozen=True)
class ClassScores:
    """Scores of `MeanIoU` by name: `miou`, `dice`, `accuracy`, and `iou/ID` of each class.

    Args:
        num_classes: K.
        background: id of the background class, which adds `miou_no_background`; None without one.
    """

    num_classes: int
    background: int | None = None
    unbounded: ClassVar[Collection[str]] = ()
    highest: ClassVar[Mapping[str, float]] = {}

    @property
    def means(self) -> Sequence[str]:
        """Return the names of the scores over all classes."""
        return ("miou", *(() if self.background is None else ("miou_no_background",)), "dice", "accuracy")

    @property
    def keys(self) -> Sequence[str]:
        """Return the names of all scores."""
        return (*self.means, *(f"iou/{index}" for index in range(self.num_classes)))

    def scores(self, sums: np.ndarray) -> dict[str, np.ndarray]:
        """Return each score (...) from sums (..., 3 K or 4 K) of its counts; nan where undefined."""
        metric = MeanIoU()
        counts = {"classes": sums.reshape(*sums.shape[:-1], -1, self.num_classes)}
        computed = metric.compute(counts)
        scores = {key: computed[key] for key in ("miou", "dice", "accuracy")}
        ious = metric.per_class(counts)["iou"]
        if self.background is not None:
            scores["miou_no_background"] = mean_defined(np.delete(ious, self.background, axis=-1))
        return scores | {f"iou/{index}": ious[..., index] for index in range(self.num_classes)}


def metric_intervals(metric: Metric, counts: Sequence[Counts], units: Sequence[str]) -> dict[str, list[float] | None]:
    """Return the 95 % interval of each score of a metric but `totals`, over the units in which it counts something.

    Args:
        metric: the metric.
        counts: its counts of each image.
        units: the unit of each image.
    """
    sums = scored_sums(np.stack([flatten_counts(row) for row in counts]), units)
    found = jackknife(FlatMetric.of(metric, counts[0]), sums)
    return {key: estimate.ci95 for key, estimate in found.items() if key not in metric.totals}
