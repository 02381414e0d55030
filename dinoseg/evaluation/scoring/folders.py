"""Folders of predictions measured against their references, in many processes, and added up by unit; no torch."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np

from dinoseg.metrics.protocols.contract import BadFile, Case, Cases, Measured, ScoreProtocol
from dinoseg.report.progress import Bar
from dinoseg.utils.cores import count_cores
from dinoseg.utils.errors import UserError
from dinoseg.utils.wording import count_of, listed
from dinoseg.utils.workers import in_processes

ON_ERROR = ("stop", "skip")
_LISTED = 20  # problems in a message; the others are in the file
_FRAMES_PER_PROCESS = 24  # fewer, of 10 ms each, are measured sooner than a process starts (0.25 s)


@dataclass
class Scored:
    """What was measured in one folder of predictions.

    Args:
        units: names of the videos or images, in order.
        sums: (U, d) float64, what each unit adds to the whole.
        total: (d,) what they add up to; whole numbers stay exact.
        rows: for each unit a row of plain numbers beside its scores.
        cases: what was measured, in order.
        problems: file and reason of what was left out.
        notes: what is odd but changes no score.
        files: frames measured, those without prediction too.
    """

    units: list[str]
    sums: np.ndarray
    total: np.ndarray
    rows: list[dict[str, Any]]
    cases: list[tuple[Case, Measured]]
    problems: list[tuple[Path, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    files: int = 0


class Unscorable(UserError):
    """Files that cannot be scored; `problems` are file and reason of all of them."""

    def __init__(self, problems: Sequence[tuple[Path, str]], where: str) -> None:
        lines = "".join(f"\n- {path}: {reason}" for path, reason in problems[:_LISTED])
        more = f"\n- and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        super().__init__(
            f"{count_of(problems, 'file')} of {where} cannot be scored:{lines}{more}\n"
            "Correct them; data.on_error=skip scores the others and lists these."
        )
        self.problems = list(problems)


def score_cases(
    protocol: ScoreProtocol,
    listing: Cases,
    *,
    where: str,
    workers: int | None = None,
    on_error: str = "stop",
    remedy: str = "Set mode.workers lower, 1 for no process beside this one, and run again.",
) -> Scored:
    """Measure all cases and add them up by unit.

    Args:
        protocol: how a case is measured.
        listing: the cases, and what was wrong with the folders.
        where: names both folders in messages.
        workers: processes; None for one per core, and none beside this one for few frames.
        on_error: `stop` when all files have been looked at, or `skip` what cannot be scored.
        remedy: what the user can do when a process was killed.

    Raises:
        Unscorable: files that cannot be scored.
        UserError: an unknown `on_error`, or nothing left to score.
    """
    if on_error not in ON_ERROR:
        raise UserError(f"data.on_error={on_error} is unknown. Choose one of {', '.join(ON_ERROR)}.")
    problems = list(listing.problems)
    cases: list[tuple[Case, Measured]] = []
    for case, result in _measure_all(protocol, listing.cases, workers, remedy):
        if isinstance(result, BadFile):
            problems += [(result.path, result.reason), *result.more]
        else:
            cases.append((case, result))
    # only now: a user who mends files wants to hear of all of them at once
    if problems and on_error == "stop":
        raise Unscorable(problems, where)
    if not cases:
        first = f", such as {problems[0][0]}: {problems[0][1]}" if problems else "."
        raise UserError(f"Nothing is left to score of {where}: {count_of(problems, 'problem')}{first}")
    joined = sums_by_unit(protocol, cases)
    return Scored(
        units=list(joined),
        sums=np.stack([unit.astype(np.float64) for unit in joined.values()]),
        total=np.sum(list(joined.values()), axis=0),
        rows=[_row(unit) for unit in _by_unit(cases).values()],
        cases=cases,
        problems=problems,
        notes=[*listing.notes, *_unknown_notes(cases), *_bare_notes(protocol, cases)],
        files=_frames(case for case, _ in cases),
    )


def _by_unit(cases: Iterable[tuple[Case, Measured]]) -> dict[str, list[tuple[Case, Measured]]]:
    by_unit: dict[str, list[tuple[Case, Measured]]] = {}
    for case, measured in cases:
        by_unit.setdefault(case.unit, []).append((case, measured))
    return by_unit


def sums_by_unit(protocol: ScoreProtocol, cases: Iterable[tuple[Case, Measured]]) -> dict[str, np.ndarray]:
    """Return each unit's sums (d,)."""
    return {unit: protocol.join([measured for _, measured in parts]) for unit, parts in _by_unit(cases).items()}


def _row(cases: Sequence[tuple[Case, Measured]]) -> dict[str, Any]:
    """Return a unit's details: its case's own, or the sums of the numbers of several."""
    details = [measured.details for _, measured in cases]
    if len(details) == 1:
        return details[0]
    keys = dict.fromkeys(key for row in details for key, value in row.items() if isinstance(value, int))
    files = _frames(case for case, _ in cases)
    return {"files": files, **{key: sum(row.get(key, 0) for row in details) for key in keys}}


def _unknown_notes(cases: Sequence[tuple[Case, Measured]]) -> list[str]:
    """Return a note for each side with pixels of no class, which some official scripts count instead of refusing."""
    notes = []
    for column, side in enumerate(("reference", "prediction")):
        key = f"unknown_pixels_{side}"
        held = [(case, measured.details[key]) for case, measured in cases if measured.details.get(key)]
        if held:
            pixels = sum(count for _, count in held)
            notes.append(
                f"{len(held)} of {count_of(cases, side)} {'holds' if len(held) == 1 else 'hold'} ids of no class, in "
                f"{count_of(pixels, 'pixel')}, such as {held[0][0].files[0][column]}. The official rule refuses "
                "none: such a pixel is void in a reference, and a miss where it is predicted on a class. Check them."
            )
    return notes


def _bare_notes(protocol: ScoreProtocol, cases: Sequence[tuple[Case, Measured]]) -> list[str]:
    """Return a note where references show no object at all, for which a rule stands in for a measurement."""
    bare = [case.name for case, measured in cases if measured.details.get("objects") == 0]
    if not bare:
        return []
    return [
        f"{len(bare)} of {count_of(cases, 'reference')} without any object: {listed(bare)}. The rule: "
        f"{protocol.rules['absent_class']}. Give them masks if they do show objects."
    ]


def _frames(cases: Iterable[Case]) -> int:
    return sum(len(case.files) for case in cases)


def _measure_all(
    protocol: ScoreProtocol, cases: Sequence[Case], workers: int | None, remedy: str
) -> Iterable[tuple[Case, Measured | BadFile]]:
    """Return each case with what it gives, in their order."""
    processes = workers or min(count_cores(), ceil(_frames(cases) / _FRAMES_PER_PROCESS))
    results = in_processes(protocol.measure, cases, processes, catch=BadFile, remedy=remedy)
    return Bar(results, total=len(cases), desc=f"scoring {protocol.name}", unit="file", leave=False)
