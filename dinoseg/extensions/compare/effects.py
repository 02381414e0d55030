"""Main effects of the settings of a sweep: least-squares means of an additive model, with intervals."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from math import isfinite, nan, sqrt
from typing import NamedTuple

import numpy as np

from dinoseg.evaluation.scoring.intervals import Estimate
from dinoseg.extensions.compare.paper_table import PaperTable
from dinoseg.utils.wording import count_of

FOLD, SEED = "data.fold", "seed"
MIN_FREEDOM = 3  # with two, the 97.5 % quantile of Student's t is 4.3: an interval is of little use
_TOLERANCE = 1e-9  # relative to the largest singular value of a design of zeros and ones


class LevelEffect(NamedTuple):
    """Effect of one value of a swept key; parts that the runs do not determine are None.

    Args:
        key: the swept key.
        level: its value.
        runs: number of runs at this level.
        mean: least-squares mean over equal shares of all levels of the other keys.
        difference: from the first level of the key; None for that level itself.
    """

    key: str
    level: str
    runs: int
    mean: Estimate | None
    difference: Estimate | None


def estimate_effects(
    settings: Sequence[Mapping[str, str]], scores: Sequence[float | None]
) -> tuple[list[LevelEffect], int]:
    """Return the effects of swept keys on a score, and the degrees of freedom of the residual.

    They are those of least squares with a term for each level of each key. The model has no interactions: those between
    keys, and those with folds, are part of the residual, as is the variation over seeds. Intervals are Student's t with
    the variance of the residual, if it has three degrees of freedom. Cells may be missing.

    Args:
        settings: values of the swept keys of each run. `data.fold` is a block, whose effect is removed and not
            returned; `seed` is no term, so that seeds are replicates.
        scores: of each run; runs with None or nan are left out.

    Returns:
        No effects if no key but fold and seed is swept, a run lacks a key, whose value is then unknown, or there are no
        more runs than terms.
    """
    keys = [key for key in dict.fromkeys(key for words in settings for key in words) if key != SEED]
    runs = [
        (words, score) for words, score in zip(settings, scores, strict=True) if score is not None and isfinite(score)
    ]
    # in the order of all runs: the first level does not depend on which of them have a score
    terms = [
        (key, level)
        for key in keys
        for level in dict.fromkeys(words[key] for words in settings if key in words)
        if any(words.get(key) == level for words, _ in runs)
    ]
    levels = Counter(key for key, _ in terms)
    if not {*levels} - {FOLD} or any({*keys} - {*words} for words in settings):
        return [], 0
    design = np.array([[1.0, *((key, level) in words.items() for key, level in terms)] for words, _ in runs])
    target = np.array([score for _, score in runs], dtype=np.float64)
    inverse = np.linalg.pinv(design, rcond=_TOLERANCE)
    freedom = len(runs) - round(float(np.trace(inverse @ design)))
    residual = target - design @ (inverse @ target)
    variance = float(residual @ residual) / freedom if freedom >= MIN_FREEDOM else nan

    def estimate(contrast: np.ndarray) -> Estimate | None:
        weights = contrast @ inverse
        if not np.allclose(weights @ design, contrast, atol=1e-6):
            return None
        return Estimate(float(weights @ target), sqrt(variance * float(weights @ weights)), freedom)

    # the row of a run at a level, with an equal share of all levels of the other keys
    rows = {
        term: np.array(
            [1.0, *(float(other == term) if other[0] == term[0] else 1 / levels[other[0]] for other in terms)]
        )
        for term in terms
    }
    first = {key: row for (key, _), row in reversed(rows.items())}
    effects = [
        LevelEffect(
            key,
            level,
            sum(words[key] == level for words, _ in runs),
            estimate(row),
            None if row is first[key] else estimate(row - first[key]),
        )
        for (key, level), row in rows.items()
        if key != FOLD
    ]
    return effects if freedom else [], freedom


def effects_table(
    effects: Sequence[LevelEffect], freedom: int, name: str, to_text: Callable[[float, str], str]
) -> PaperTable:
    """Return effects and the freedom of their residual as a table.

    Args:
        effects: the effects.
        freedom: degrees of freedom of the residual.
        name: heading of the score.
        to_text: formats a value, with its sign where the second argument is `+`.
    """
    rows = []
    for key, level, runs, mean, difference in effects:
        values = [to_text(mean.value, "") if mean else "-", to_text(difference.value, "+") if difference else "-"]
        ends = [to_text(end, "+") for end in (difference and difference.ci95) or ()]
        rows.append([key, level, str(runs), *values, f"[{', '.join(ends)}]" if ends else "-"])
    interval = f"Student's t with {count_of(freedom, 'degree')} of freedom of its residual, for these images"
    caption = (
        "Main effects: least-squares means of an additive model of the swept keys, with folds as blocks and seeds as "
        "replicates. Differences are from the first level of a key. 95 % interval: "
    )
    caption += interval if freedom >= MIN_FREEDOM else f"none, for lack of {MIN_FREEDOM} degrees of freedom"
    # else one table would show two numbers of one thing without a reason
    caption += (
        ". Means are over the scores of single runs, and intervals over runs: they differ from scores that pool the "
        "images of folds, and from intervals over images or groups"
    )
    return PaperTable(f"{caption}.", ["key", "level", "runs", name, "difference", "95 % interval"], rows, 2)
