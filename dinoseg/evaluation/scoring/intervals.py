"""Confidence intervals of scores over units: Student's t with the standard error of the jackknife; no torch.

Units vary independently, unlike the frames of one video. The jackknife leaves out each unit once. The change of the
score gives the error of any function of sums over units (J. W. Tukey, 1958; R. G. Miller, 1974).
benchmarks/interval_coverage.py shows why this is not a bootstrap.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from math import exp, inf, isfinite, nan, sqrt
from statistics import fmean, stdev
from typing import Protocol

import numpy as np

METHOD = "Student's t, jackknife over units"  # as written to results
_MAX_LOGITS = 500.0
_AT_ONCE = 2**22  # values per chunk, 32 MiB


class ScoreFunction(Protocol):
    """Interface of scores from sums over units, implemented by every `SumProtocol`."""

    @property
    def keys(self) -> Sequence[str]:
        """Return the names of the scores."""

    @property
    def unbounded(self) -> Collection[str]:
        """Return the names of the scores that may lie outside 0..1."""

    @property
    def highest(self) -> Mapping[str, float]:
        """Return the upper bound of each unbounded score that has one."""

    def scores(self, sums: np.ndarray) -> dict[str, np.ndarray]:
        """Return each key's score (...) from sums (..., d); nan where undefined."""


@dataclass(frozen=True)
class Estimate:
    """A score or a difference, with its standard error.

    Args:
        value: nan where undefined.
        error: standard error; nan with too few units.
        freedom: degrees of freedom of the error.
        share: whether the value and its interval lie in 0..1; the interval is then computed on the logit scale.
        lowest: lower bound of the value, where its interval is clipped.
        highest: upper bound of the value, where its interval is clipped.
    """

    value: float
    error: float = nan
    freedom: float = nan
    share: bool = False
    lowest: float = -inf
    highest: float = inf

    @property
    def ci95(self) -> list[float] | None:
        """Return the 95 % interval; None without an error."""
        if not isfinite(self.value) or not isfinite(self.error):
            return None
        # lazy import: it would slow down every program start
        from scipy.special import stdtrit

        if not self.error:
            return [self.value, self.value]
        reach = self.error * float(stdtrit(self.freedom, 0.975))
        if not (self.share and 0 < self.value < 1):
            return [max(self.value - reach, self.lowest), min(self.value + reach, self.highest)]
        # the logit has the error e / (v (1 - v)) (delta method). Its interval, turned back, stays in 0..1 and holds the
        # IoU of a rare class in 87 % of samples of 5 drives, where the plain one does in 83 %
        # (docs/log/scores_and_exports.md)
        odds = self.value / (1 - self.value)
        factor = exp(min(reach / (self.value * (1 - self.value)), _MAX_LOGITS))
        return [odds / (odds + factor), odds * factor / (1 + odds * factor)]

    @property
    def p(self) -> float | None:
        """Return the p-value of the value under a true value of 0; below 0.05 where `ci95` excludes 0."""
        if self.ci95 is None:
            return None
        if not self.error:
            return 0.0 if self.value else 1.0
        from scipy.special import stdtr

        return float(2 * stdtr(self.freedom, -abs(self.value) / self.error))


@dataclass(frozen=True)
class UnitScore:
    """A score over units, and without each of them.

    Args:
        value: over all units; None or nan where undefined.
        left_out: (U,) without each unit, in the order of the units' first images; None or nan where undefined.
        scored: (U,) whether something counts in each unit. Others say nothing about the score.
        better: max or min, which value is the best.
        settings: the metric's class and plain options, as text.
    """

    value: float | None
    left_out: Sequence[float | None] | np.ndarray
    scored: Sequence[bool] | np.ndarray
    better: str = "max"
    settings: str = ""

    def estimate(self, *, is_share: bool = True, highest: float = inf) -> Estimate:
        """Return the score with its error over the units that are scored.

        A score that is undefined without one of the units depends on that unit alone, and has no error.

        Args:
            is_share: whether it lies in 0..1.
            highest: upper bound of another score.
        """
        value = nan if self.value is None else float(self.value)
        # units in which nothing counts add degrees of freedom and no information: the interval would be too narrow
        left_out = np.array(self.left_out, np.float64)[np.array(self.scored, bool)]
        lowest, highest = (0.0, 1.0) if is_share else (-inf, highest)
        error, freedom = jackknife_error(left_out), len(left_out) - 1
        return Estimate(value, error, freedom, share=is_share, lowest=lowest, highest=highest)


def score_units(function: ScoreFunction, sums: np.ndarray) -> dict[str, UnitScore]:
    """Return each key's score over units, from sums (U, d) of the units."""
    whole, scored = function.scores(add_units(sums)), has_labels(sums)
    # without its only unit a score is undefined, and scores of protocols would divide by zero
    left_out = leave_one_out(function, sums) if scored.sum() > 1 else {}
    undefined = np.full(len(sums), nan)
    return {key: UnitScore(float(whole[key]), left_out.get(key, undefined), scored) for key in function.keys}


def jackknife(function: ScoreFunction, sums: np.ndarray) -> dict[str, Estimate]:
    """Return each key's score over all units with its error, from sums (U, d) of the units."""
    return estimate_scores(score_units(function, sums), function.unbounded, function.highest)


def estimate_scores(
    scores: Mapping[str, UnitScore], unbounded: Collection[str], highest: Mapping[str, float]
) -> dict[str, Estimate]:
    """Return scores by name with their errors, from the names of the `unbounded` ones and their upper bounds."""
    return {
        key: score.estimate(is_share=key not in unbounded, highest=highest.get(key, inf))
        for key, score in scores.items()
    }


def subtract_means(first: Sequence[UnitScore], second: Sequence[UnitScore]) -> np.ndarray:
    """Return the mean of a score over the runs of a second side minus that of a first side.

    Returns:
        (1 + U,) float64: over all units, and without each.
    """
    scores = np.array([[run.value, *run.left_out] for run in (*first, *second)], dtype=np.float64)
    # means of equal scores over different numbers of runs may differ in a digit; means of zeros do not
    relative = scores - scores[:1]
    return relative[len(first) :].mean(axis=0) - relative[: len(first)].mean(axis=0)


def estimate_difference(
    first: Sequence[UnitScore], second: Sequence[UnitScore], seeds: Sequence[Sequence[Estimate]] = ((), ())
) -> Estimate:
    """Return the difference of `subtract_means`, paired by unit.

    The error is that over the units that any run has `scored`, and over the seeds of both sides. With a single unit, it
    is that over seeds alone, if both sides have several.

    Args:
        first: of each run of the first side.
        second: of each run of the second side.
        seeds: of each side, estimates with its errors over seeds; empty for a single one.
    """
    # both sides leave out the same unit, so what is hard for both cancels in the difference
    gaps = subtract_means(first, second)
    scored = np.array([run.scored for run in (*first, *second)], bool).any(axis=0)
    left_out = gaps[1:][scored]
    gap = Estimate(float(gaps[0]), jackknife_error(left_out), len(left_out) - 1)
    # a single unit shows no variance: the error is that over seeds alone
    if len(left_out) == 1 and all(seeds):
        gap = replace(gap, error=0.0, freedom=1)
    return combine_errors(gap, [each for of_side in seeds for each in of_side])


def jackknife_error(left_out: np.ndarray) -> float:
    """Return the standard error of a score from its values (U,) without each unit.

    It is nan for a single unit, and if one of the values is not finite.
    """
    count = len(left_out)
    if count < 2 or not np.isfinite(left_out).all():
        return nan
    # jackknife: (n - 1) / n sum_i (s_i - mean(s))^2 for the scores s_i without unit i (J. W. Tukey, 1958)
    return sqrt((count - 1) / count * float(((left_out - left_out.mean()) ** 2).sum()))


def leave_one_out(function: ScoreFunction, sums: np.ndarray) -> dict[str, np.ndarray]:
    """Return each key's scores (U,) of all units but one, from sums (U, d) of the units."""
    # sums without a unit are those of all minus its own, so n units cost n evaluations of the score and no recount
    whole, at_once = add_units(sums), max(1, _AT_ONCE // sums.shape[1])
    parts = [function.scores(whole - sums[start : start + at_once]) for start in range(0, len(sums), at_once)]
    return {key: np.concatenate([np.zeros(0), *(part[key] for part in parts)]) for key in function.keys}


def mean_of(values: Sequence[float], lowest: float = -inf, highest: float = inf) -> Estimate:
    """Return the mean of independent values, such as scores of several seeds, with its error (Student, 1908).

    The mean is undefined if one of the values is. Its interval is clipped to the bounds of the values.
    """
    if len(values) < 2 or not all(map(isfinite, values)):  # stdev raises on these
        return Estimate(fmean(values) if values else nan)
    return Estimate(fmean(values), stdev(values) / sqrt(len(values)), len(values) - 1, lowest=lowest, highest=highest)


def combine_errors(estimate: Estimate, others: Sequence[Estimate]) -> Estimate:
    """Return an estimate whose error includes those of other estimates (F. E. Satterthwaite, 1946)."""
    parts = [(each.error**2, each.freedom) for each in (estimate, *others)]
    whole = sum(variance for variance, _ in parts)
    if not whole > 0:
        return replace(estimate, error=sqrt(whole) if whole == 0 else nan)
    # (sum v)^2 / sum(v^2 / f) for variances v with f degrees of freedom
    freedom = whole**2 / sum(variance**2 / each for variance, each in parts)
    return replace(estimate, error=sqrt(whole), freedom=freedom)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Return p-values adjusted for multiple comparisons (S. Holm, 1979); None stays None and does not count."""
    order = sorted((p_value, index) for index, p_value in enumerate(p_values) if p_value is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    least = 0.0
    for rank, (p_value, index) in enumerate(order):
        # the i-th smallest of m, from 0, is multiplied by m - i, and none may fall below the one before
        adjusted[index] = least = min(1.0, max(least, (len(order) - rank) * p_value))
    return adjusted


def unit_sums(counts: np.ndarray, units: Sequence[str]) -> np.ndarray:
    """Return the sums (U, d) of counts (N, ...) by unit, in the order in which the units first occur."""
    places = {unit: index for index, unit in enumerate(dict.fromkeys(units))}
    # no copy: the counts of thousands of images may take gigabytes
    if len(places) == len(units):
        return counts.reshape(len(units), -1)
    sums = np.zeros((len(places), *counts.shape[1:]), np.result_type(counts, np.int64))
    # np.add.at takes ten times as long for large rows
    for unit, row in zip(units, counts, strict=True):
        sums[places[unit]] += row
    return sums.reshape(len(places), -1)


def add_units(sums: np.ndarray) -> np.ndarray:
    """Return the sum (d,) of the sums (U, d) of all units, int64 or float64: narrow types would overflow."""
    return sums.sum(axis=0, dtype=np.result_type(sums, np.int64))


def has_labels(sums: np.ndarray) -> np.ndarray:
    """Return which units (U,) have a count in their sums (U, d).

    The others, such as a video without a labelled pixel, say nothing about a score. Counted as units, they would make
    its interval too narrow.
    """
    return np.any(sums, axis=1)
