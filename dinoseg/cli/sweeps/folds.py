"""Summaries of cross-validation: the folds of a setting are averaged and pooled, not ranked."""

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

import numpy as np

from dinoseg.metrics.counts import iou, mean_defined, ratio

FOLD = "data.fold"
DEVIATION = "deviation"
Row = dict[str, Any]


def with_summaries(rows: Sequence[Row], settings: Sequence[str], scores: Sequence[str]) -> list[list[Row]]:
    """Return the rows of each setting in the order of their folds, followed by mean, deviation and pooled scores.

    The deviation is the sample standard deviation, which needs two folds. Pooled scores use the sum of all confusion
    matrices, in which every image counts once.

    Args:
        rows: of all jobs.
        settings: swept keys except the fold.
        scores: keys to summarise.
    """
    return [_summarised(sorted(group, key=_fold), settings, scores) for group in grouped(rows, settings)]


def grouped(rows: Sequence[Row], settings: Sequence[str]) -> list[list[Row]]:
    """Return the rows of each setting, in the order of first appearance."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in settings), []).append(row)
    return [*groups.values()]


def _fold(row: Mapping[str, Any]) -> tuple[int, str]:
    text = str(row[FOLD])
    return (int(text), "") if text.isdecimal() else (-1, text)


def _summarised(folds: list[Row], settings: Sequence[str], scores: Sequence[str]) -> list[Row]:
    defined = {key: [row[key] for row in folds if row[key] is not None] for key in scores}
    whole = sum(not row["note"] for row in folds)
    same = {key: folds[0][key] for key in settings}
    note = "" if whole == len(folds) else f"{whole} of {len(folds)} folds"
    rows = {
        "mean": {key: fmean(values) if values else None for key, values in defined.items()},
        DEVIATION: {key: stdev(values) if len(values) > 1 else None for key, values in defined.items()},
    }
    if matrices := [row["matrix"] for row in folds if row["matrix"] is not None]:
        rows["pooled"] = {**dict.fromkeys(scores), **_pooled(matrices, folds[0])}
    return folds + [{"job": "", FOLD: name, "note": note, **same, **row} for name, row in rows.items()]


def _pooled(matrices: Sequence[Any], fold: Row) -> Row:
    """Return the scores of the sum of confusion matrices (K, K), whose rows are the reference.

    `background` and `ignored_class` of a fold's row are ids, or None.
    """
    background, ignored = fold.get("background"), fold.get("ignored_class")
    counts = np.sum([np.asarray(matrix, dtype=np.int64) for matrix in matrices], axis=0)
    hits = counts.diagonal()
    ious = iou(hits, counts.sum(axis=0) - hits, counts.sum(axis=1) - hits)
    if ignored is not None:
        ious[ignored] = np.nan
    objects = {} if background is None else {"miou_no_background": float(mean_defined(np.delete(ious, background)))}
    return {"miou": float(mean_defined(ious)), **objects, "accuracy": float(ratio(hits.sum(), counts.sum()))}
