"""JSON summary of the scores of one folder of predictions, and the difference of two folders; no torch."""

from typing import Any

import numpy as np

from dinoseg.evaluation.scoring.intervals import METHOD, Difference, jackknife, scored_sums
from dinoseg.extensions.protocols.contract import ScoreProtocol
from dinoseg.extensions.protocols.folders import ScoringResult, sums_by_unit


def summary(protocol: ScoreProtocol, scored: ScoringResult) -> dict[str, Any]:
    """Return scores, rows by class and unit, rules, intervals and notes, ready for JSON; None means undefined."""
    unit_scores = protocol.scores(scored.sums)
    grouped = len({*scored.groups}) < len(scored.units)
    rows = [
        {
            "name": name,
            **({"group": scored.groups[index]} if grouped else {}),
            **{key: _plain(unit_scores[key][index]) for key in protocol.keys},
            **scored.rows[index],
        }
        for index, name in enumerate(scored.units)
    ]
    values = protocol.scores(scored.total)
    sums = scored_sums(scored.sums, scored.groups)
    return {
        "protocol": protocol.name,
        "scores": {key: _plain(values[key]) for key in protocol.keys},
        "per_class": [{key: _plain(value) for key, value in row.items()} for row in protocol.per_class(scored.total)],
        "per_image" if protocol.unit == "image" else "per_video": rows,
        "rules": dict(protocol.rules),
        "n": len(sums),
        "unit": "group" if grouped else protocol.unit,
        "scored_unit": protocol.unit,
        "files": scored.files,
        "ci95": {key: estimate.ci95 for key, estimate in jackknife(protocol, sums).items()},
        "interval": METHOD,
        "notes": scored.notes,
        "problems": [{"file": str(path), "reason": reason} for path, reason in scored.problems],
    }


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
    by_unit = [
        sums_by_unit(protocol, [(case, sums) for case, sums in scored.cases if case.name in shared])
        for scored in (first, second)
    ]
    pair = [np.stack([each[unit] for unit in by_unit[0]]).astype(np.float64) for each in by_unit]
    group = dict(zip(first.units, first.groups, strict=True))
    sums = scored_sums(np.concatenate(pair, axis=1), [group[unit] for unit in by_unit[0]])
    found = jackknife(Difference(protocol), sums)
    counts = {"n": len(sums), "left_out": left_out}
    return {key: {"value": _plain(gap.value), "ci95": gap.ci95, "p": gap.p, **counts} for key, gap in found.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        value = value.item()
    return None if isinstance(value, float) and not np.isfinite(value) else value
