"""Intervals of scores over units: Student's t with the standard error of the jackknife; no torch.

The units are what varies independently, not the frames of one video. Each is left out once: how much the score moves
gives the error of whatever is a function of sums over units (J. W. Tukey, 1958; R. G. Miller, 1974). Why not a
bootstrap: benchmarks/interval_coverage.py.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from math import exp, inf, isfinite, nan, sqrt
from statistics import fmean, stdev
from typing import Protocol

import numpy as np

METHOD = "Student's t, jackknife over units"  # as results say it
_MOST_LOGITS = 500.0
_AT_ONCE = 2**22  # numbers, 32 MiB


class Scores(Protocol):
    """What gives scores of sums over units, as every `ScoreProtocol` does."""

    @property
    def keys(self) -> Sequence[str]:
        """Names of the scores."""
        ...

    @property
    def signed(self) -> Collection[str]:
        """Names of those that may lie outside 0..1."""
        ...

    @property
    def highest(self) -> Mapping[str, float]:
        """What those can be at most that have a bound."""
        ...

    def scores(self, sums: np.ndarray) -> dict[str, np.ndarray]:
        """Return each key's score (...) from sums (..., d); nan where it is undefined."""
        ...


@dataclass(frozen=True)
class Difference:
    """Scores of a second side less those of a first, each side one run or more, whose scores are averaged.

    Args:
        protocol: of the scores; the sums (..., runs * d) hold those of all runs side by side.
        first: runs of the first side, which come first.
        second: runs of the second side.
    """

    protocol: Scores
    first: int = 1
    second: int = 1

    @property
    def keys(self) -> Sequence[str]:
        """Names of the scores."""
        return self.protocol.keys

    @property
    def signed(self) -> Collection[str]:
        """All of them."""
        return self.keys

    @property
    def highest(self) -> Mapping[str, float]:
        """Of none: two scores of at most 1 may differ by more."""
        return {}

    def scores(self, sums: np.ndarray) -> dict[str, np.ndarray]:
        """Return each key's difference (...)."""
        found = self.protocol.scores(sums.reshape(*sums.shape[:-1], self.first + self.second, -1))
        # beside one of the runs, since means of equal scores, of more runs and of fewer, may differ in the last place
        beside = {key: values - values[..., :1] for key, values in found.items()}
        parts = {key: np.split(values, [self.first], axis=-1) for key, values in beside.items()}
        return {key: second.mean(axis=-1) - first.mean(axis=-1) for key, (first, second) in parts.items()}


@dataclass(frozen=True)
class Estimate:
    """A score or a difference, and how far it may be off.

    Args:
        value: nan where it is undefined.
        error: its standard error; nan where there are too few units for one.
        freedom: degrees of freedom of the error.
        share: it lies in 0..1, and so does its interval, which is that of its logit.
        highest: that it can be, where its interval ends.
    """

    value: float
    error: float = nan
    freedom: float = nan
    share: bool = False
    highest: float = inf

    @property
    def ci95(self) -> list[float] | None:
        """The 95 % interval; None where there is no error."""
        if not isfinite(self.value) or not isfinite(self.error):
            return None
        from scipy.special import stdtrit  # not before it is asked for: each start of the program would wait for it

        if not self.error:
            return [self.value, self.value]
        reach = self.error * float(stdtrit(self.freedom, 0.975))
        if not (self.share and 0 < self.value < 1):
            return [self.value - reach, min(self.value + reach, self.highest)]
        odds, factor = self.value / (1 - self.value), exp(min(reach / (self.value * (1 - self.value)), _MOST_LOGITS))
        return [odds / (odds + factor), odds * factor / (1 + odds * factor)]

    @property
    def p(self) -> float | None:
        """The chance of a value this far from 0 if the truth were 0; below 0.05 where `ci95` leaves 0 out."""
        if self.ci95 is None:
            return None
        if not self.error:
            return 0.0 if self.value else 1.0
        from scipy.special import stdtr

        return float(2 * stdtr(self.freedom, -abs(self.value) / self.error))


def jackknife(protocol: Scores, sums: np.ndarray) -> dict[str, Estimate]:
    """Return each key's score of all units with its error, from sums (U, d) over each.

    A score that is undefined without one of the units rests on that unit alone, and has no error.
    """
    values = {key: float(value) for key, value in protocol.scores(sums.sum(axis=0)).items()}
    count = len(sums)
    if count < 2:
        return {key: Estimate(values[key]) for key in protocol.keys}
    left_out = without_each(protocol, sums)
    found = {}
    for key in protocol.keys:
        gaps = left_out[key] - left_out[key].mean()
        error = sqrt((count - 1) / count * float((gaps**2).sum()))
        share, highest = key not in protocol.signed, protocol.highest.get(key, inf)
        found[key] = Estimate(values[key], error, count - 1, share=share, highest=highest)
    return found


def without_each(protocol: Scores, sums: np.ndarray) -> dict[str, np.ndarray]:
    """Return each key's scores (U,) of all units but one, from sums (U, d) over each."""
    whole, at_once = sums.sum(axis=0), max(1, _AT_ONCE // sums.shape[1])
    parts = [protocol.scores(whole - sums[start : start + at_once]) for start in range(0, len(sums), at_once)]
    return {key: np.concatenate([part[key] for part in parts]) for key in protocol.keys}


def mean_of(values: Sequence[float]) -> Estimate:
    """Return the mean of independent values, such as scores of several seeds, with its error (Student, 1908).

    Where one of them is undefined, so is the mean.
    """
    if len(values) < 2 or not all(map(isfinite, values)):  # of such stdev raises
        return Estimate(fmean(values) if values else nan)
    return Estimate(fmean(values), stdev(values) / sqrt(len(values)), len(values) - 1)


def widened(estimate: Estimate, others: Sequence[Estimate]) -> Estimate:
    """Return an estimate whose error has those of others beside its own (F. E. Satterthwaite, 1946)."""
    parts = [(each.error**2, each.freedom) for each in (estimate, *others)]
    whole = sum(variance for variance, _ in parts)
    if not whole > 0:
        return replace(estimate, error=sqrt(whole) if whole == 0 else nan)
    freedom = whole**2 / sum(variance**2 / each for variance, each in parts)
    return replace(estimate, error=sqrt(whole), freedom=freedom)


def holm(chances: Sequence[float | None]) -> list[float | None]:
    """Return p-values that hold for all of them together (S. Holm, 1979); None stays, and counts for nothing."""
    order = sorted((chance, place) for place, chance in enumerate(chances) if chance is not None)
    adjusted: list[float | None] = [None] * len(chances)
    least = 0.0
    for rank, (chance, place) in enumerate(order):
        adjusted[place] = least = min(1.0, max(least, (len(order) - rank) * chance))
    return adjusted
