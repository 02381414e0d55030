"""Scores with all that explains them, of one folder of predictions, and the difference of two; no torch."""

from typing import Any

import numpy as np

from dinoseg.metrics.protocols.contract import ScoreProtocol
from dinoseg.scoring.folders import Scored, sums_by_unit
from dinoseg.scoring.intervals import intervals, resampled


def summary(protocol: ScoreProtocol, scored: Scored, *, resamples: int = 1000, seed: int = 0) -> dict[str, Any]:
    """Return the scores with everything that explains them, ready for JSON; None means undefined.

    The intervals are percentile bootstraps over units.
    """
    unit_scores = protocol.scores(scored.sums)
    rows = [
        {"name": name, **{key: _plain(unit_scores[key][index]) for key in protocol.keys}, **scored.rows[index]}
        for index, name in enumerate(scored.units)
    ]
    values = protocol.scores(scored.total)
    return {
        "protocol": protocol.name,
        "scores": {key: _plain(values[key]) for key in protocol.keys},
        "per_class": [{key: _plain(value) for key, value in row.items()} for row in protocol.per_class(scored.total)],
        "per_image" if protocol.unit == "image" else "per_video": rows,
        "rules": dict(protocol.rules),
        "n": len(scored.units),
        "unit": protocol.unit,
        "files": scored.files,
        "ci95": intervals(protocol, resampled(protocol, scored.sums, resamples, seed)),
        "bootstrap": {"over": protocol.unit, "n": len(scored.units), "resamples": resamples, "seed": seed},
        "notes": scored.notes,
        "problems": [{"file": str(path), "reason": reason} for path, reason in scored.problems],
    }


def difference(
    protocol: ScoreProtocol, first: Scored, second: Scored, *, resamples: int = 1000, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Return for each key `second` minus `first`, with the interval of this paired difference.

    The same units are drawn for both, so what makes a video hard for both does not widen the interval. A case, which
    is a frame or a sequence, that only one of them has is left out of both (`left_out`), and the unit with its last
    case. Where they share no case, all values are None and `n` is 0.
    """
    # by case, not by unit: a video of which one side lacks a frame is still compared on the others
    names = [{case.name for case, _ in scored.cases} for scored in (first, second)]
    shared, left_out = names[0] & names[1], len(names[0] ^ names[1])
    if not shared:
        return {key: {"value": None, "ci95": None, "n": 0, "left_out": left_out} for key in protocol.keys}
    by_unit = [
        sums_by_unit(protocol, [(case, sums) for case, sums in scored.cases if case.name in shared])
        for scored in (first, second)
    ]
    pair = [np.stack([unit_sums[unit] for unit in by_unit[0]]).astype(np.float64) for unit_sums in by_unit]
    values = [protocol.scores(sums.sum(axis=0)) for sums in pair]
    drawn = [resampled(protocol, sums, resamples, seed) for sums in pair]
    limits = intervals(protocol, {key: drawn[1][key] - drawn[0][key] for key in protocol.keys})
    counts = {"n": len(by_unit[0]), "left_out": left_out}
    return {
        key: {"value": _plain(values[1][key] - values[0][key]), "ci95": limits[key], **counts} for key in protocol.keys
    }


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        value = value.item()
    return None if isinstance(value, float) and not np.isfinite(value) else value
