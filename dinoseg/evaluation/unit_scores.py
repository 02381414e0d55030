"""Scores as functions of sums over units, so that leaving out units gives their intervals and differences."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import numpy as np

from dinoseg.core.metric import Counts, RowMetric, plain_score
from dinoseg.evaluation.scoring.intervals import (
    Estimate,
    combine_errors,
    estimate_scores,
    jackknife_error,
    mean_of,
)
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


class UnitScores(NamedTuple):
    """Scores of a metric over units.

    Attributes:
        values: by name, over all units.
        left_out: by name, (U,) without each unit, in the order of the units' first images.
        scored: (U,) bool, whether the metric counts something in each unit.
    """

    values: Mapping[str, np.ndarray]
    left_out: Mapping[str, np.ndarray]
    scored: np.ndarray


def leave_units_out(metric: RowMetric, counts: Sequence[Counts], units: Sequence[str]) -> UnitScores:
    """Return the scores of a metric over all units and without each, from its counts and the unit of each image."""
    places = {unit: index for index, unit in enumerate(dict.fromkeys(units))}
    numbers = [places[unit] for unit in units]
    scored = np.zeros(len(places), bool)
    for number, row in zip(numbers, counts, strict=True):
        scored[number] |= metric.has_counts(row)
    left_out = {name: np.full(1, np.nan) for name in metric.scores}
    if len(places) > 1:
        left_out = metric.leave_one_out(counts, numbers)
    return UnitScores(metric.score_rows(counts), left_out, scored)


def metric_intervals(metric: RowMetric, scores: UnitScores) -> dict[str, list[float] | None]:
    """Return the 95 % interval of each score of a metric but `totals`, over the units in which it counts something."""
    left_out = {key: each[scores.scored] for key, each in scores.left_out.items()}
    found = estimate_scores(scores.values, left_out, metric.unbounded, {})
    return {key: estimate.ci95 for key, estimate in found.items() if key not in metric.totals}


@dataclass(frozen=True)
class FurtherScore:
    """A score in 0..1 of a metric over the images of an evaluation.

    Args:
        better: max or min, which value is the best.
        settings: the metric's class and plain options, as text.
        value: over all units; None where undefined.
        left_out: without each unit, in the order of the units' first images; None where undefined.
        scored: whether the metric counts something in each unit.
    """

    better: str
    settings: str
    value: float | None
    left_out: Sequence[float | None]
    scored: Sequence[bool]


def further_scores(metric: RowMetric, scores: UnitScores) -> dict[str, FurtherScore]:
    """Return the scores of a metric by name, without `unbounded` ones."""
    values, left_out, scored = scores
    return {
        name: FurtherScore(
            better, metric.settings, plain_score(values[name]), [*map(plain_score, left_out[name])], scored.tolist()
        )
        for name, better in metric.scores.items()
        if name not in metric.unbounded
    }


def shared_scores(runs: Sequence[Mapping[str, FurtherScore]]) -> list[str]:
    """Return the names of the scores that all runs have, with the same settings."""
    settings = [{name: score.settings for name, score in scores.items()} for scores in runs]
    return [name for name, value in settings[0].items() if all(other.get(name) == value for other in settings)]


def further_difference(first: Sequence[FurtherScore], second: Sequence[FurtherScore]) -> Estimate:
    """Return the mean of a score over the runs of a second side minus that of a first side, paired by unit.

    The error is that over the units that any run has `scored` and, for sides with several runs, over runs, as in
    `comparison.differences`.
    """
    scores = np.array([[run.value, *run.left_out] for run in (*first, *second)], dtype=np.float64)
    scores = scores[:, [True, *np.any([run.scored for run in (*first, *second)], axis=0)]]
    relative = scores - scores[:1]  # means of equal scores over different numbers of runs may differ in a digit
    gaps = relative[len(first) :].mean(axis=0) - relative[: len(first)].mean(axis=0)
    gap = Estimate(float(gaps[0]), jackknife_error(gaps[1:]), len(gaps) - 2)
    by_seed = [mean_of(values[:, 0].tolist()) for values in np.split(scores, [len(first)]) if len(values) > 1]
    if len(gaps) == 2 and len(by_seed) == 2:  # of a single unit
        gap = replace(gap, error=0.0, freedom=1)
    return combine_errors(gap, by_seed)
