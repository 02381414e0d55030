"""Precisions and recalls of the objects of a class, of all images and without each unit (an image or a group).

Without a unit, each curve is that of the other objects. Between two objects of the unit in the order of scores, both
numbers of hits and of misses are smaller by a constant, its shift. Many units have the same shifts: the highest
precisions of stretches of a curve are computed once for each shift, and each unit reads about a hundred of them.
Computing each unit's curve anew costs units times objects instead.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import NamedTuple

import numpy as np

from dinoseg.core.metric import Counts

RECALLS = np.linspace(0, 1, 101)  # at which precisions are read
_EPSILON = np.spacing(1)
_TABLE_SIZE = 2**22  # precisions that are computed at once: 32 MB


@dataclass(frozen=True)
class PrecisionCurves:
    """Precisions and recalls of one class, for each range of areas and IoU.

    Only the places of hits matter: a precision is read at a hit, and the highest one after it is that of a hit.

    Args:
        hits: (N, 4, 10) bool, predicted objects in the order of their scores.
        misses: (N, 4, 10) bool.
        owners: (N,) int64, the unit of each predicted object.
        positives: (G, 4) bool, reference objects.
        holders: (G,) int64, the unit of each reference object.
    """

    hits: np.ndarray
    misses: np.ndarray
    owners: np.ndarray
    positives: np.ndarray
    holders: np.ndarray

    @property
    def units(self) -> np.ndarray:
        """The units with an object of the class, sorted."""
        return np.unique(np.concatenate([self.owners, self.holders]))

    @cached_property
    def places(self) -> np.ndarray:
        """Places (P,) of the hits."""
        return np.flatnonzero(self.hits.any(axis=(1, 2)))

    @cached_property
    def counts(self) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of hits and of misses (P, 4, 10) up to each place."""
        return self.hits.cumsum(axis=0)[self.places], self.misses.cumsum(axis=0)[self.places]

    def average(self, without: int | None = None) -> np.ndarray:
        """Return the AP (4, 10), without the objects of one unit; nan without a reference object."""
        found, missed = self.counts
        hits = self.hits[self.places]
        if without is not None:
            own = np.flatnonzero(self.owners == without)
            before = np.searchsorted(own, self.places, side="right")
            found = found - _sum_first(self.hits[own])[before]
            missed = missed - _sum_first(self.misses[own])[before]
            hits = hits & (self.owners[self.places] != without)[:, None, None]
        numbers = self.positives[self.holders != without].sum(axis=0)
        precision = found / (found + missed + _EPSILON)
        highest = np.maximum.accumulate(precision[::-1])[::-1]
        read = [_count_recalls(number)[found[:, size]] for size, number in enumerate(numbers.tolist())]
        values = (np.stack(read, axis=1) * highest * hits).sum(axis=0) / len(RECALLS)
        return np.where(numbers[:, None] > 0, values, np.nan)


def make_curves(rows: Sequence[Counts], units: np.ndarray) -> Iterator[tuple[int, PrecisionCurves]]:
    """Yield each class of a reference object with its curves, from the rows of images and the unit of each image."""
    if not rows:
        return
    joined = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
    owners = np.repeat(units, [len(row["classes"]) for row in rows])
    holders = np.repeat(units, [len(row["labels"]) for row in rows])
    # equal scores stay in the order of the images
    order = np.argsort(-joined["scores"], kind="stable")
    for label in np.unique(joined["labels"]).tolist():
        own = order[joined["classes"][order] == label]
        held = joined["labels"] == label
        sides = joined["hits"][own], joined["misses"][own], owners[own], joined["positives"][held], holders[held]
        yield label, PrecisionCurves(*sides)


def leave_units_out(curves: PrecisionCurves) -> tuple[np.ndarray, np.ndarray]:
    """Return the units (U,) with an object of the class, and the AP (U, 4, 10) without each of them."""
    units = curves.units
    owners = np.searchsorted(units, curves.owners)
    if not _is_shifting_cheaper(curves, owners, len(units)):
        return units, np.stack([curves.average(without=unit) for unit in units.tolist()])
    holders = np.searchsorted(units, curves.holders)
    values = np.full((len(units), *curves.hits.shape[1:]), np.nan)
    for size in range(values.shape[1]):
        own = np.bincount(holders[curves.positives[:, size]], minlength=len(units))
        numbers = own.sum() - own
        recalls = _list_recalls(numbers)
        for iou in range(values.shape[2]):
            left = _leave_out(curves.hits[:, size, iou], curves.misses[:, size, iou], owners, recalls)
            values[:, size, iou] = np.where(numbers > 0, left, np.nan)
    return units, values


def _is_shifting_cheaper(curves: PrecisionCurves, owners: np.ndarray, count: int) -> bool:
    """Return whether the shifts of units are so few that their tables cost less than a curve for each unit."""
    most = np.bincount(owners, minlength=1).max()
    most_hits = np.bincount(owners[curves.places], minlength=1).max()
    levels = len(curves.places).bit_length()
    return bool((most + 1) * (most_hits + 1) * levels < 4 * count)  # measured: equal times at 300 images of 20 objects


class _Recalls(NamedTuple):
    """Hits at which recalls are read without each unit; units with equal numbers of other objects share a row.

    Args:
        kind: (U,), the row of each unit.
        reached: (K, 101), the number of hits at which each recall is first reached.
        below: (K, G + 1), how many recalls are reached with each number of hits.
    """

    kind: np.ndarray
    reached: np.ndarray
    below: np.ndarray


def _list_recalls(numbers: np.ndarray) -> _Recalls:
    """Return the recalls from the numbers (U,) of other reference objects of each unit."""
    kinds, kind = np.unique(numbers, return_inverse=True)
    recalls = [_count_recalls(number) for number in kinds.tolist()]
    reached = np.stack([np.repeat(np.arange(len(each)), each)[: len(RECALLS)] for each in recalls])
    below = np.zeros((len(kinds), max(map(len, recalls))), np.int64)
    for place, each in enumerate(recalls):
        below[place, : len(each)] = each.cumsum()
    return _Recalls(kind, reached, below)


def _leave_out(hits: np.ndarray, misses: np.ndarray, owners: np.ndarray, recalls: _Recalls) -> np.ndarray:
    """Return the AP (U,) without each unit, from flags (N,), their units (N,) and the recalls of units."""
    count = len(recalls.kind)
    total = int(hits.sum())
    if total == 0:
        return np.zeros(count)
    found = hits.cumsum()
    own = np.flatnonzero(hits | misses)
    own = own[np.argsort(owners[own], kind="stable")]
    # a unit with E objects has E + 1 stretches: of the hits before, between and after them
    stretches = np.bincount(owners[own], minlength=count) + 1
    first = stretches.cumsum() - stretches
    unit = np.repeat(np.arange(count), stretches)
    later = np.flatnonzero(np.diff(unit, prepend=-1) == 0)
    begin = np.zeros(len(unit), np.int64)
    begin[later] = found[own]
    end = np.full(len(unit), total)
    end[later - 1] = found[own] - hits[own]
    shift = np.zeros((2, len(unit)), np.int64)
    shift[:, later] = hits[own], misses[own]
    shift = shift.cumsum(axis=1)
    shift -= shift[:, first[unit]]

    # the hits at which recalls are read, and the stretch of each
    entered = recalls.below[recalls.kind[unit], begin - shift[0]]  # recalls that are reached before a stretch
    width = len(RECALLS) + 1
    passed = np.bincount(unit * width + entered, minlength=count * width).reshape(-1, width)
    stretch = first[:, None] - 1 + passed[:, :-1].cumsum(axis=1)  # (U, 101)
    hit = recalls.reached[recalls.kind] - 1 + shift[0, stretch]

    # of a stretch the highest precision of all its hits, and of those from each recall on
    highest = _find_highest(
        (np.arange(1, total + 1), misses.cumsum()[hits]),
        (shift, end),
        np.concatenate([np.arange(len(unit)), stretch.ravel()]),
        np.concatenate([begin, hit.ravel()]),
    )
    after = _accumulate_later(highest[: len(unit)], unit)
    return np.maximum(highest[len(unit) :].reshape(stretch.shape), after[stretch]).sum(axis=1) / len(RECALLS)


def _find_highest(
    counts: tuple[np.ndarray, np.ndarray],
    stretches: tuple[np.ndarray, np.ndarray],
    stretch: np.ndarray,
    begin: np.ndarray,
) -> np.ndarray:
    """Return the highest precision (Q,) from a hit to the end of its stretch, 0 where the stretch has ended before.

    Args:
        counts: numbers of hits (P,) and of misses (P,) up to each hit.
        stretches: what each of S stretches subtracts from both (2, S), and the hit before which it ends (S,).
        stretch: (Q,), the stretch of each query.
        begin: (Q,), the hit from which each query begins.
    """
    total = len(counts[0])
    shift, end = stretches
    base = int(shift[1].max()) + 1
    codes, code = np.unique(shift[0] * base + shift[1], return_inverse=True)
    length = end[stretch] - begin
    values = np.zeros(len(stretch))
    powers = np.frexp(np.arange(total + 1))[1] - 1  # the largest power of two that a length holds
    step = max(1, _TABLE_SIZE // (total * total.bit_length()))
    for start in range(0, len(codes), step):
        hits, misses = (each[:, None] for each in np.divmod(codes[start : start + step], base))
        table = [(counts[0] - hits) / (counts[0] - hits + (counts[1] - misses) + _EPSILON)]
        for power in range(total.bit_length() - 1):
            wider = table[-1].copy()
            np.maximum(table[-1][:, : -(2**power)], table[-1][:, 2**power :], out=wider[:, : -(2**power)])
            table.append(wider)
        flat = np.stack(table).ravel()
        row = code[stretch] - start
        part = np.flatnonzero((length > 0) & (row >= 0) & (row < step))
        power = powers[length[part]]
        left = (power * len(hits) + row[part]) * total + begin[part]
        # two windows of a power of two cover the range
        values[part] = np.maximum(flat[left], flat[left + length[part] - 2**power])
    return values


def _accumulate_later(values: np.ndarray, unit: np.ndarray) -> np.ndarray:
    """Return the highest (S,) of the later values of the same unit, 0 after the last; `unit` is sorted."""
    levels, rank = np.unique(values, return_inverse=True)
    # ranks are integers, so that adding a multiple for each unit is exact
    offset = (unit[-1] - unit) * len(levels)
    highest = levels[np.maximum.accumulate((rank + offset)[::-1])[::-1] - offset]
    return np.append(np.where(np.diff(unit) == 0, highest[1:], 0), 0)


@cache
def _count_recalls(number: int) -> np.ndarray:
    """Return how many of the recalls are first reached at the n-th hit, (number + 1,) int64."""
    reached = np.arange(1, number + 1) / max(number, 1)
    return np.bincount(np.searchsorted(reached, RECALLS) + 1, minlength=number + 1)


def _sum_first(flags: np.ndarray) -> np.ndarray:
    """Return the sums (N + 1, ...) of the first 0..N of N flags."""
    return np.concatenate([np.zeros((1, *flags.shape[1:]), np.int64), flags.cumsum(axis=0)])
