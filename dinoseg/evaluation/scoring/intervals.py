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
        ...

    @property
    def unbounded(self) -> Collection[str]:
        """Return the names of the scores that may lie outside 0..1."""
        ...

    @property
    def highest(self) -> Mapping[str, float]:
        """Return the upper bound of each unbounded score that has one."""
        ...

    def scores(self, sums: np.ndarray) -> dict[str, np.ndarray]:
        """Return each key's score (...) from sums (..., d); nan where undefined."""
        ...


@dataclass(frozen=True)
class Difference:
    """Scores of a second side minus those of a first side, averaged over the runs of each side.

    Args:
        protocol: protocol of the scores; the sums (..., runs * d) concatenate those of all runs.
        first: number of runs of the first side, which come first.
        second: number of runs of the second side.
    """

    protocol: ScoreFunction
    first: int = 1
    second: int = 1

    @property
    def keys(self) -> Sequence[str]:
        """Return the names of the scores."""
        return self.protocol.keys

    @property
    def unbounded(self) -> Collection[str]:
        """Return all names: any difference may be negative."""
        return self.keys

    @property
    def highest(self) -> Mapping[str, float]:
        """Return no bounds: two scores of at most 1 may differ by more than 1."""
        return {}

    def scores(self, sums: np.ndarray) -> dict[str, np.ndarray]:
        """Return each key's difference (...)."""
        found = self.protocol.scores(sums.reshape(*sums.shape[:-1], self.first + self.second, -1))
        # relative to one run: means of equal scores over different numbers of runs may differ in the last digit
        relative = {key: values - values[..., :1] for key, values in found.items()}
        parts = {key: np.split(values, [self.first], axis=-1) for key, values in relative.items()}
        return {key: second.mean(axis=-1) - first.mean(axis=-1) for key, (first, second) in parts.items()}


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
        from scipy.special import stdtrit  # lazy import: it would slow down every program start

        if not self.error:
            return [self.value, self.value]
        reach = self.error * float(stdtrit(self.freedom, 0.975))
        if not (self.share and 0 < self.value < 1):
            return [max(self.value - reach, self.lowest), min(self.value + reach, self.highest)]
        odds, factor = self.value / (1 - self.value), exp(min(reach / (self.value * (1 - self.value)), _MAX_LOGITS))
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


def jackknife(protocol: ScoreFunction, sums: np.ndarray) -> dict[str, Estimate]:
    """Return each key's score over all units with its error, from sums (U, d) of the units.

    A score that is undefined without one of the units depends on that unit alone, and has no error.
    """
    whole = protocol.scores(add_units(sums))
    left_out = leave_one_out(protocol, sums) if len(sums) > 1 else {}
    return estimate_scores({key: whole[key] for key in protocol.keys}, left_out, protocol.unbounded, protocol.highest)


def estimate_scores(
    values: Mapping[str, np.ndarray | float],
    left_out: Mapping[str, np.ndarray],
    unbounded: Collection[str],
    highest: Mapping[str, float],
) -> dict[str, Estimate]:
    """Return scores with their errors, from their values (U,) without each unit; without errors if there are none."""
    if not left_out:
        return {key: Estimate(float(value)) for key, value in values.items()}
    found = {}
    for key, value in values.items():
        error = jackknife_error(left_out[key])
        share = key not in unbounded
        bounds = (0.0, 1.0) if share else (-inf, highest.get(key, inf))
        freedom = len(left_out[key]) - 1
        found[key] = Estimate(float(value), error, freedom, share=share, lowest=bounds[0], highest=bounds[1])
    return found


def jackknife_error(left_out: np.ndarray) -> float:
    """Return the standard error of a score from its values (U,) without each unit.

    It is nan for a single unit, and if one of the values is not finite.
    """
    count = len(left_out)
    if count < 2 or not np.isfinite(left_out).all():
        return nan
    return sqrt((count - 1) / count * float(((left_out - left_out.mean()) ** 2).sum()))


def leave_one_out(protocol: ScoreFunction, sums: np.ndarray) -> dict[str, np.ndarray]:
    """Return each key's scores (U,) of all units but one, from sums (U, d) of the units."""
    whole, at_once = add_units(sums), max(1, _AT_ONCE // sums.shape[1])
    parts = [protocol.scores(whole - sums[start : start + at_once]) for start in range(0, len(sums), at_once)]
    return {key: np.concatenate([part[key] for part in parts]) for key in protocol.keys}


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
    freedom = whole**2 / sum(variance**2 / each for variance, each in parts)
    return replace(estimate, error=sqrt(whole), freedom=freedom)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Return p-values adjusted for multiple comparisons (S. Holm, 1979); None stays None and does not count."""
    order = sorted((p_value, index) for index, p_value in enumerate(p_values) if p_value is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    least = 0.0
    for rank, (p_value, index) in enumerate(order):
        adjusted[index] = least = min(1.0, max(least, (len(order) - rank) * p_value))
    return adjusted


def unit_sums(counts: np.ndarray, units: Sequence[str]) -> np.ndarray:
    """Return the sums (U, d) of counts (N, ...) by unit, in the order in which the units first occur."""
    places = {unit: index for index, unit in enumerate(dict.fromkeys(units))}
    if len(places) == len(units):  # no copy: the counts of thousands of images may take gigabytes
        return counts.reshape(len(units), -1)
    sums = np.zeros((len(places), *counts.shape[1:]), np.result_type(counts, np.int64))
    for unit, row in zip(units, counts, strict=True):  # np.add.at takes ten times as long for large rows
        sums[places[unit]] += row
    return sums.reshape(len(places), -1)


def add_units(sums: np.ndarray) -> np.ndarray:
    """Return the sum (d,) of the sums (U, d) of all units, int64 or float64: narrow types would overflow."""
    return sums.sum(axis=0, dtype=np.result_type(sums, np.int64))


def scored_sums(counts: np.ndarray, units: Sequence[str]) -> np.ndarray:
    """Return the sums (U, d) of counts (N, ...) by unit, as `unit_sums` does, of those units that have a count."""
    sums = unit_sums(counts, units)
    return sums[has_labels(sums)]


def has_labels(sums: np.ndarray) -> np.ndarray:
    """Return which units (U,) have a count in their sums (U, d).

    The others, such as a video without a labelled pixel, say nothing about a score. Counted as units, they would make
    its interval too narrow.
    """
    return np.any(sums, axis=1)
