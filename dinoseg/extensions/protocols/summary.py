"""JSON summary of the scores of one folder of predictions, and the difference of two folders; no torch."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dinoseg.evaluation.scoring.intervals import (
    METHOD,
    UnitScore,
    estimate_difference,
    estimate_scores,
    score_units,
    unit_sums,
)
from dinoseg.evaluation.unit_scores import leave_units_out
from dinoseg.extensions.protocols.contract import Measured, RowProtocol, ScoreProtocol, ScoringCase, SumProtocol
from dinoseg.extensions.protocols.folders import ScoringResult, sums_by_unit


def summary(protocol: ScoreProtocol, scored: ScoringResult) -> dict[str, Any]:
    """Return scores, rows by class and unit, rules, intervals and notes, ready for JSON; None means undefined."""
    scores, unit_scores, classes = _evaluate(protocol, scored)
    by_group = _score_groups(protocol, dict(zip(scored.units, scored.groups, strict=True)), scored.cases)
    grouped = len({*scored.groups}) < len(scored.units)
    rows = [
        {
            "name": name,
            **({"group": scored.groups[index]} if grouped else {}),
            **{key: _to_plain(unit_scores[key][index]) for key in protocol.keys},
            **scored.rows[index],
        }
        for index, name in enumerate(scored.units)
    ]
    estimates = estimate_scores(by_group, protocol.unbounded, protocol.highest)
    return {
        "protocol": protocol.name,
        "scores": {key: _to_plain(scores[key]) for key in protocol.keys},
        "per_class": [{key: _to_plain(value) for key, value in row.items()} for row in classes],
        "per_image" if protocol.unit == "image" else "per_video": rows,
        "rules": dict(protocol.rules),
        "n": int(np.sum(by_group[protocol.keys[0]].scored)),
        "unit": "group" if grouped else protocol.unit,
        "scored_unit": protocol.unit,
        "files": scored.files,
        "ci95": {key: estimate.ci95 for key, estimate in estimates.items()},
        "interval": METHOD,
        "notes": scored.notes,
        "problems": [{"file": str(path), "reason": reason} for path, reason in scored.problems],
    }


def _evaluate(
    protocol: ScoreProtocol, scored: ScoringResult
) -> tuple[Mapping[str, np.ndarray], Mapping[str, np.ndarray], list[dict[str, Any]]]:
    """Return the scores over all units, those of each unit (U,), and rows of the classes."""
    if isinstance(protocol, RowProtocol):
        rows = [measured.rows for _, measured in scored.cases]
        by_unit = [protocol.metric.score_rows([row]) for row in rows]
        unit_scores = {key: np.array([found[key] for found in by_unit]) for key in protocol.keys}
        return protocol.metric.score_rows(rows), unit_scores, protocol.per_class(rows)
    assert isinstance(protocol, SumProtocol)
    return protocol.scores(scored.total), protocol.scores(scored.sums), protocol.per_class(scored.total)


def _score_groups(
    protocol: ScoreProtocol, groups: Mapping[str, str], cases: Sequence[tuple[ScoringCase, Measured]]
) -> dict[str, UnitScore]:
    """Return the scores of measured cases over groups, by the group of each unit."""
    if isinstance(protocol, RowProtocol):
        return leave_units_out(
            protocol.metric, [measured.rows for _, measured in cases], [groups[case.unit] for case, _ in cases]
        )
    assert isinstance(protocol, SumProtocol)
    by_unit = sums_by_unit(protocol, cases)
    sums = np.stack([*by_unit.values()]).astype(np.float64)
    return score_units(protocol, unit_sums(sums, [groups[unit] for unit in by_unit]))


def difference(protocol: ScoreProtocol, first: ScoringResult, second: ScoringResult) -> dict[str, dict[str, Any]]:
    """Return for each key `second` minus `first`, with the interval and p-value of this paired difference.

    Each group is left out of both at once, so a video that is hard for both does not widen the interval. A case (a
    frame or a sequence) that only one folder has is left out of both and counted in `left_out`; a group is left out
    with its last case. If the folders share no case, all values are None and `n` is 0.
    """
    # by case, not by unit: if one side lacks a frame, the video's other frames are still compared
    sides = [{case.name: (case, held) for case, held in scored.cases} for scored in (first, second)]
    shared, left_out = [name for name in sides[0] if name in sides[1]], len(sides[0].keys() ^ sides[1].keys())
    if not shared:
        return {key: {"value": None, "ci95": None, "p": None, "n": 0, "left_out": left_out} for key in protocol.keys}
    groups = dict(zip(first.units, first.groups, strict=True))
    ours, theirs = (_score_groups(protocol, groups, [cases[name] for name in shared]) for cases in sides)
    found = {key: estimate_difference([ours[key]], [theirs[key]]) for key in protocol.keys}
    scored = np.logical_or(ours[protocol.keys[0]].scored, theirs[protocol.keys[0]].scored)
    counts = {"n": int(scored.sum()), "left_out": left_out}
    return {key: {"value": _to_plain(gap.value), "ci95": gap.ci95, "p": gap.p, **counts} for key, gap in found.items()}


def _to_plain(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        value = value.item()
    return None if isinstance(value, float) and not np.isfinite(value) else value
