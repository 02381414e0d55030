"""JSON summary of the scores of one folder of predictions, and the difference of two folders; no torch."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dinoseg.core.metric import Counts, RowMetric
from dinoseg.evaluation.scoring.intervals import (
    METHOD,
    Difference,
    Estimate,
    estimate_scores,
    jackknife,
    scored_sums,
)
from dinoseg.evaluation.unit_scores import leave_units_out
from dinoseg.extensions.protocols.contract import Measured, RowProtocol, ScoreProtocol, ScoringCase, SumProtocol
from dinoseg.extensions.protocols.folders import ScoringResult, sums_by_unit


def summary(protocol: ScoreProtocol, scored: ScoringResult) -> dict[str, Any]:
    """Return scores, rows by class and unit, rules, intervals and notes, ready for JSON; None means undefined."""
    found = _evaluate(protocol, scored)
    grouped = len({*scored.groups}) < len(scored.units)
    rows = [
        {
            "name": name,
            **({"group": scored.groups[index]} if grouped else {}),
            **{key: _plain(found.unit_scores[key][index]) for key in protocol.keys},
            **scored.rows[index],
        }
        for index, name in enumerate(scored.units)
    ]
    return {
        "protocol": protocol.name,
        "scores": {key: _plain(found.scores[key]) for key in protocol.keys},
        "per_class": [{key: _plain(value) for key, value in row.items()} for row in found.classes],
        "per_image" if protocol.unit == "image" else "per_video": rows,
        "rules": dict(protocol.rules),
        "n": found.units,
        "unit": "group" if grouped else protocol.unit,
        "scored_unit": protocol.unit,
        "files": scored.files,
        "ci95": {key: estimate.ci95 for key, estimate in found.estimates.items()},
        "interval": METHOD,
        "notes": scored.notes,
        "problems": [{"file": str(path), "reason": reason} for path, reason in scored.problems],
    }


class _Evaluated(NamedTuple):
    """Scores over all units, of each unit (U,) and by class; estimates over the number of groups that count."""

    scores: Mapping[str, np.ndarray]
    unit_scores: Mapping[str, np.ndarray]
    classes: list[dict[str, Any]]
    estimates: Mapping[str, Estimate]
    units: int


def _evaluate(protocol: ScoreProtocol, scored: ScoringResult) -> _Evaluated:
    if isinstance(protocol, RowProtocol):
        rows = [measured.rows for _, measured in scored.cases]
        by_unit = [protocol.metric.score_rows([row]) for row in rows]
        units, sides = _select_rows(dict(zip(scored.units, scored.groups, strict=True)), scored.cases)
        return _Evaluated(
            scores=protocol.metric.score_rows(rows),
            unit_scores={key: np.array([found[key] for found in by_unit]) for key in protocol.keys},
            classes=protocol.per_class(rows),
            estimates=_jackknife_rows(protocol.metric, units, *sides),
            units=len({*units}),
        )
    assert isinstance(protocol, SumProtocol)
    sums = scored_sums(scored.sums, scored.groups)
    classes = protocol.per_class(scored.total)
    scores = protocol.scores(scored.total), protocol.scores(scored.sums)
    return _Evaluated(*scores, classes, jackknife(protocol, sums), len(sums))


def _jackknife_rows(metric: RowMetric, units: Sequence[str], *sides: Sequence[Counts]) -> dict[str, Estimate]:
    """Return each score over all images with its error, or the difference of the scores of two sides.

    Args:
        metric: computes the scores.
        units: the unit of each image.
        sides: rows of each image, once, or of a first and a second side.
    """
    first, *others = [leave_units_out(metric, rows, units) for rows in sides]
    if not others:
        return estimate_scores(first.values, first.left_out, metric.unbounded, {})
    values = {key: others[0].values[key] - first.values[key] for key in metric.scores}
    left_out = {key: others[0].left_out[key] - first.left_out[key] for key in metric.scores}
    return estimate_scores(values, left_out, [*metric.scores], {})


def _select_rows(
    groups: Mapping[str, str], *sides: Sequence[tuple[ScoringCase, Measured]]
) -> tuple[list[str], list[list[Counts]]]:
    """Return the groups and each side's rows of the cases that have a count, see `has_labels`, on one of the sides."""
    chosen = [cases for cases in zip(*sides, strict=True) if any(measured.sums.any() for _, measured in cases)]
    units = [groups[cases[0][0].unit] for cases in chosen]
    return units, [[cases[side][1].rows for cases in chosen] for side in range(len(sides))]


def difference(protocol: ScoreProtocol, first: ScoringResult, second: ScoringResult) -> dict[str, dict[str, Any]]:
    """Return for each key `second` minus `first`, with the interval and p-value of this paired difference.

    Each group is left out of both at once, so a video that is hard for both does not widen the interval. A case (a
    frame or a sequence) that only one folder has is left out of both and counted in `left_out`; a group is left out
    with its last case. If the folders share no case, all values are None and `n` is 0.
    """
    # by case, not by unit: if one side lacks a frame, the video's other frames are still compared
    names = [{case.name for case, _ in scored.cases} for scored in (first, second)]
    shared, left_out = names[0] & names[1], len(names[0] ^ names[1])
    if not shared:
        return {key: {"value": None, "ci95": None, "p": None, "n": 0, "left_out": left_out} for key in protocol.keys}
    groups = dict(zip(first.units, first.groups, strict=True))
    sides = [[(case, held) for case, held in scored.cases if case.name in shared] for scored in (first, second)]
    if isinstance(protocol, RowProtocol):
        units, rows = _select_rows(groups, *sides)
        found, count = _jackknife_rows(protocol.metric, units, *rows), len({*units})
    else:
        assert isinstance(protocol, SumProtocol)
        by_unit = [sums_by_unit(protocol, cases) for cases in sides]
        pair = [np.stack([each[unit] for unit in by_unit[0]]).astype(np.float64) for each in by_unit]
        sums = scored_sums(np.concatenate(pair, axis=1), [groups[unit] for unit in by_unit[0]])
        found, count = jackknife(Difference(protocol), sums), len(sums)
    counts = {"n": count, "left_out": left_out}
    return {key: {"value": _plain(gap.value), "ci95": gap.ci95, "p": gap.p, **counts} for key, gap in found.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        value = value.item()
    return None if isinstance(value, float) and not np.isfinite(value) else value
