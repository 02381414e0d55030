"""Scores and costs of compared runs: one row per run and one per side, best first."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dinoseg.evaluation.comparison import best_first, scores_of
from dinoseg.evaluation.sides import Side
from dinoseg.training.cost import COST
from dinoseg.utils import forms

logger = logging.getLogger(__name__)
_KEYS = {
    "parameters": forms.whole(),
    "trainable": forms.whole(),
    "images_per_s": forms.maybe(forms.number(1e-9, 1e9)),  # bounded so that its inverse is finite
    "memory_gib": forms.maybe(forms.number(0, 1e9)),
}


def run_rows(sides: Sequence[Side]) -> list[dict[str, Any]]:
    """Return a row for each run, by mIoU; unknown values are None, and a damaged cost record is logged."""
    rows = []
    runs = [run for side in sides for run in zip(side.names, side.folders, side.records, strict=True)]
    for name, folder, record in runs:
        scores = scores_of([record])
        trained = [folder, Path(record.source).parent.parent]  # run of mode=train, or the checkpoint's
        found = next((path for run in trained if (path := run / COST).is_file()), None)
        cost = (None if found is None else _read(found)) or dict.fromkeys(_KEYS)
        speed = cost.pop("images_per_s")
        seconds = 1 / speed if speed else None
        rows.append({"run": name, "miou": scores["miou"], "accuracy": scores["accuracy"], **cost, "seconds": seconds})
    return _ranked(rows)


def side_rows(sides: Sequence[Side], rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each side, by mIoU: means over the rows of its runs; None if any run's value is unknown."""
    by_run = {row["run"]: row for row in rows}
    return _ranked([_mean(side.name, [by_run[name] for name in side.names]) for side in sides])


def _mean(name: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    mean: dict[str, Any] = {"run": name}
    for key in rows[0].keys() - {"run"}:
        values = [row[key] for row in rows]
        mean[key] = None if None in values else sum(values) / len(values)
    return mean | {key: round(mean[key]) for key in ("parameters", "trainable") if mean[key] is not None}


def _ranked(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [rows[index] for index in best_first([row["miou"] for row in rows])]


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return forms.read_json(path, forms.record(**_KEYS))
    except (OSError, forms.Misshapen) as error:
        logger.warning("%s is damaged (%s): the run's costs are left out. Remove it, or train again.", path, error)
        return None
