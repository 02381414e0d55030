"""Scores of further metrics in comparisons: stored without the metric, by their values without each unit."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dinoseg.core.metric import Counts, Metric, plain_score
from dinoseg.evaluation.scoring.intervals import Estimate, combine_errors, jackknife_error, leave_one_out, mean_of
from dinoseg.evaluation.scoring.units import has_labels, unit_sums
from dinoseg.metrics.flat import FlatMetric, flatten_counts


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


def further_scores(metric: Metric, counts: Sequence[Counts], units: Sequence[str]) -> dict[str, FurtherScore]:
    """Return the scores of a metric by name, without `unbounded` ones, from its counts and the unit of each image."""
    sums = unit_sums(np.stack([flatten_counts(row) for row in counts]), units)
    function = FlatMetric.of(metric, counts[0])
    whole, left_out = function.scores(sums.sum(axis=0)), leave_one_out(function, sums)
    scored = has_labels(sums).tolist()
    return {
        name: FurtherScore(
            better, metric.settings, plain_score(whole[name]), [*map(plain_score, left_out[name])], scored
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
