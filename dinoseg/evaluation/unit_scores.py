"""Scores as functions of sums over units, so that leaving out units gives their intervals and differences."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from dinoseg.core.metric import Counts, RowMetric, plain_score
from dinoseg.evaluation.scoring.intervals import UnitScore, estimate_scores
from dinoseg.metrics.counts import mean_defined
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


def leave_units_out(metric: RowMetric, counts: Sequence[Counts], units: Sequence[str]) -> dict[str, UnitScore]:
    """Return the scores of a metric over units, from its counts and the unit of each image."""
    places = {unit: index for index, unit in enumerate(dict.fromkeys(units))}
    numbers = [places[unit] for unit in units]
    scored = [False] * len(places)
    for number, row in zip(numbers, counts, strict=True):
        scored[number] |= metric.has_counts(row)
    values = metric.score_rows(counts)
    left_out = {name: np.full(len(places), np.nan) for name in metric.scores}
    if sum(scored) > 1:  # as in `score_units`
        left_out = metric.leave_one_out(counts, numbers)
    return {
        name: UnitScore(plain_score(values[name]), [*map(plain_score, left_out[name])], scored, better, metric.settings)
        for name, better in metric.scores.items()
    }


def further_scores(metric: RowMetric, scores: Mapping[str, UnitScore]) -> dict[str, UnitScore]:
    """Return the scores of a metric by name, without `unbounded` ones."""
    return {name: score for name, score in scores.items() if name not in metric.unbounded}


def metric_intervals(metric: RowMetric, scores: Mapping[str, UnitScore]) -> dict[str, list[float] | None]:
    """Return the 95 % interval of each score of a metric but `totals`, over the units in which it counts something."""
    found = estimate_scores(scores, metric.unbounded, {})
    return {name: estimate.ci95 for name, estimate in found.items() if name not in metric.totals}
