"""Official scores of whole folders: measured in many processes, summed, and resampled for intervals; no torch."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from dinoseg.errors import UserError
from dinoseg.metrics.protocols.contract import BadFile, Case, Found, Measured, ScoreProtocol
from dinoseg.processes import count_cores, in_processes

ON_ERROR = ("stop", "skip")
_LISTED = 20  # problems in a message; the others are in the file
_CASES_PER_PROCESS = 8  # fewer are measured sooner than a process starts


@dataclass
class Scored:
    """What was measured in one folder of predictions.

    Args:
        units: names of the videos or images, in order.
        sums: (U, d) float64, what each unit adds to the whole.
        total: (d,) what they add up to; whole numbers stay exact.
        rows: for each unit a row of plain numbers beside its scores.
        problems: file and reason of what was left out.
        notes: what is odd but changes no score.
        files: pairs of files measured.
    """

    units: list[str]
    sums: np.ndarray
    total: np.ndarray
    rows: list[dict[str, Any]]
    problems: list[tuple[Path, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    files: int = 0


class Unscorable(UserError):
    """Files that cannot be scored; `problems` are file and reason of all of them."""

    def __init__(self, problems: Sequence[tuple[Path, str]], where: str) -> None:
        lines = "".join(f"\n- {path}: {reason}" for path, reason in problems[:_LISTED])
        more = f"\n- and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        super().__init__(
            f"{len(problems)} file(s) of {where} cannot be scored:{lines}{more}\n"
            "Correct them; data.on_error=skip scores the others and lists these."
        )
        self.problems = list(problems)


def score(
    protocol: ScoreProtocol, found: Found, *, where: str, workers: int | None = None, on_error: str = "stop"
) -> Scored:
    """Measure all cases and add them up by unit.

    Args:
        protocol: how a case is measured.
        found: the cases, and what was wrong with the folders.
        where: names the predictions in messages.
        workers: processes, None for one per core; few cases are measured in this one.
        on_error: `stop` when all files have been looked at, or `skip` what cannot be scored.

    Raises:
        Unscorable: files that cannot be scored.
        UserError: an unknown `on_error`, no workers, or nothing left to score.
    """
    if on_error not in ON_ERROR:
        raise UserError(f"data.on_error={on_error} is unknown. Choose one of {', '.join(ON_ERROR)}.")
    if workers is not None and workers < 1:
        raise UserError(f"mode.workers={workers}: give the number of processes, 1 or more, or null for one per core.")
    problems = list(found.problems)
    by_unit: dict[str, list[Measured]] = {}
    for case, result in _measure_all(protocol, found.cases, workers):
        if isinstance(result, BadFile):
            problems.append((result.path, result.reason))
        else:
            by_unit.setdefault(case.unit, []).append(result)
    if problems and on_error == "stop":
        raise Unscorable(problems, where)
    if not by_unit:
        raise UserError(f"Nothing is left to score in {where}: {len(problems)} problems. Check the folders.")
    joined = [protocol.join(measured) for measured in by_unit.values()]
    return Scored(
        units=list(by_unit),
        sums=np.stack([unit.astype(np.float64) for unit in joined]),
        total=np.sum(joined, axis=0),
        rows=[_row(measured) for measured in by_unit.values()],
        problems=problems,
        notes=found.notes,
        files=sum(map(len, by_unit.values())),
    )


def result(protocol: ScoreProtocol, scored: Scored, *, resamples: int = 1000, seed: int = 0) -> dict[str, Any]:
    """Return the scores with everything that explains them, ready for JSON; None means undefined.

    The intervals are percentile bootstraps over units (B. Efron, 1979): the units are what varies independently, not
    the frames of one video.
    """
    unit_scores = protocol.scores(scored.sums)
    rows = [
        {"name": name, **{key: _plain(unit_scores[key][place]) for key in protocol.keys}, **scored.rows[place]}
        for place, name in enumerate(scored.units)
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
        "ci95": _intervals(protocol, _resampled(protocol, scored.sums, resamples, seed)),
        "bootstrap": {"over": protocol.unit, "resamples": resamples, "seed": seed},
        "notes": scored.notes,
        "problems": [{"file": str(path), "reason": reason} for path, reason in scored.problems],
    }


def difference(
    protocol: ScoreProtocol, first: Scored, second: Scored, *, resamples: int = 1000, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Return for each key `second` minus `first`, with the interval of this paired difference.

    The same units are drawn for both, so what makes a video hard for both does not widen the interval. A unit that
    only one of them has is left out of both.
    """
    shared = [name for name in first.units if name in set(second.units)]
    pair = [one.sums[[one.units.index(name) for name in shared]] for one in (first, second)]
    values = [protocol.scores(sums.sum(axis=0)) for sums in pair]
    drawn = [_resampled(protocol, sums, resamples, seed) for sums in pair]
    intervals = _intervals(protocol, {key: drawn[1][key] - drawn[0][key] for key in protocol.keys})
    return {
        key: {"value": _plain(values[1][key] - values[0][key]), "ci95": intervals[key], "n": len(shared)}
        for key in protocol.keys
    }


def _resampled(protocol: ScoreProtocol, sums: np.ndarray, resamples: int, seed: int) -> dict[str, np.ndarray]:
    """Return each key's scores (resamples,) of units drawn with replacement; empty for fewer than two units."""
    count = len(sums)
    if count < 2 or resamples < 1:
        return {key: np.empty(0) for key in protocol.keys}
    drawn = np.random.default_rng(seed).multinomial(count, [1 / count] * count, size=resamples)  # (R, U)
    return protocol.scores(drawn.astype(np.float64) @ sums)


def _intervals(protocol: ScoreProtocol, drawn: dict[str, np.ndarray]) -> dict[str, list[float] | None]:
    intervals: dict[str, list[float] | None] = {}
    for key in protocol.keys:
        defined = drawn[key][np.isfinite(drawn[key])]
        intervals[key] = [float(limit) for limit in np.percentile(defined, (2.5, 97.5))] if len(defined) else None
    return intervals


def _row(measured: Sequence[Measured]) -> dict[str, Any]:
    """Return a unit's details: its case's own, or the sums of the numbers of several."""
    if len(measured) == 1:
        return measured[0].details
    keys = dict.fromkeys(key for one in measured for key, value in one.details.items() if isinstance(value, int))
    return {"files": len(measured), **{key: sum(one.details.get(key, 0) for one in measured) for key in keys}}


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        value = value.item()
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _measure_all(
    protocol: ScoreProtocol, cases: Sequence[Case], workers: int | None
) -> Iterable[tuple[Case, Measured | BadFile]]:
    """Return each case with what it gives, in their order."""
    processes = min(workers or count_cores(), ceil(len(cases) / _CASES_PER_PROCESS))
    remedy = f"Set mode.workers below {processes} and run again."
    results = in_processes(protocol.measure, cases, processes, catch=BadFile, remedy=remedy)
    return tqdm(results, total=len(cases), desc=f"scoring {protocol.name}", unit="file", disable=None, leave=False)
