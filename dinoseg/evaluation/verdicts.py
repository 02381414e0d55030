"""Whether sides of a comparison differ: over units and seeds, with intervals and p-values that hold together."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from dinoseg.evaluation.class_scores import ClassScores
from dinoseg.evaluation.scoring.intervals import Difference, Estimate, holm, jackknife, mean_of, widened, without_each
from dinoseg.report.verdicts import LEVEL, NO_VERDICT, SURELY_BETTER, SURELY_WORSE, UNSURE

Runs = Sequence[np.ndarray]  # of one side: sums (U, 3 K) of each over the same units


def mean_scores(kind: ClassScores, side: Runs) -> dict[str, float | None]:
    """Return each score, averaged over a side's runs; None where one is undefined."""
    found = {key: values.mean() for key, values in _scores(kind, side).items()}
    return {key: float(value) if np.isfinite(value) else None for key, value in found.items()}


def differences(kind: ClassScores, sides: Sequence[Runs]) -> list[dict[str, dict[str, Any]]]:
    """Return for each side but the first what each of its scores differs by from the first one's.

    A difference has a `value`, the interval `ci95`, `p`, and by it a `verdict`; `p` is corrected by Holm over all
    sides, and for classes over these too.
    """
    gaps = [_difference(kind, sides[0], side) for side in sides[1:]]
    families = [*([key] for key in kind.means), [key for key in kind.keys if key not in kind.means]]
    found: list[dict[str, dict[str, Any]]] = [{} for _ in gaps]
    for family in families:
        members = [(number, key) for number in range(len(gaps)) for key in family]
        chances = holm([gaps[number][key].p for number, key in members])
        for (number, key), chance in zip(members, chances, strict=True):
            gap = gaps[number][key]
            value = gap.value if np.isfinite(gap.value) else None
            found[number][key] = {"value": value, "ci95": gap.ci95, "p": chance, "verdict": _verdict(gap, chance)}
    return found


def deciding(kind: ClassScores, first: Runs, second: Runs) -> list[float | None]:
    """Return what each image adds to the difference of mIoU: that of all images less that of all others.

    Both sides' runs are counts (N, 3, K) of the same images.
    """
    whole, sums = Difference(kind, len(first), len(second)), _side_by_side(first, second)
    gaps = float(whole.scores(sums.sum(axis=0))["miou"]) - without_each(whole, sums)["miou"]
    return [float(gap) if np.isfinite(gap) else None for gap in gaps]


def _difference(kind: ClassScores, first: Runs, second: Runs) -> dict[str, Estimate]:
    """Return each score's difference; its error is that over units and, of sides with several runs, over these.

    Over one unit it is that over runs alone, where both sides have several.
    """
    found = jackknife(Difference(kind, len(first), len(second)), _side_by_side(first, second))
    by_seed = [_scores(kind, side) for side in (first, second) if len(side) > 1]
    if len(first[0]) == 1 and len(by_seed) == 2:
        found = {key: replace(gap, error=0.0, freedom=1) for key, gap in found.items()}
    return {key: widened(gap, [mean_of(scores[key].tolist()) for scores in by_seed]) for key, gap in found.items()}


def _side_by_side(*sides: Runs) -> np.ndarray:
    runs = [run.reshape(len(run), -1) for side in sides for run in side]
    return np.concatenate(runs, axis=1).astype(np.float64)


def _scores(kind: ClassScores, side: Runs) -> dict[str, np.ndarray]:
    """Return each score (S,) of a side's runs."""
    return kind.scores(np.stack([run.sum(axis=0).reshape(-1) for run in side]))


def _verdict(gap: Estimate, chance: float | None) -> str:
    if chance is None:
        return NO_VERDICT
    return UNSURE if chance >= LEVEL else SURELY_BETTER if gap.value > 0 else SURELY_WORSE
