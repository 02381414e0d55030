"""Scoring of prediction folders against references, in parallel processes, with sums by unit; no torch."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np

from dinoseg.extensions.protocols.contract import BadFile, Cases, Measured, ScoreProtocol, ScoringCase
from dinoseg.report.progress import Bar
from dinoseg.utils.cores import count_cores
from dinoseg.utils.errors import UserError
from dinoseg.utils.ranges import OnError
from dinoseg.utils.wording import count_of, join_names, list_first
from dinoseg.utils.workers import in_processes

_FRAMES_PER_PROCESS = 24  # fewer (10 ms each) take less time than a process start (0.25 s)


@dataclass
class ScoringResult:
    """Measurements of one folder of predictions.

    Args:
        units: names of the videos or images, in order.
        groups: of the units, in their order: intervals are over groups.
        sums: (U, d) float64, the contribution of each unit.
        total: (d,) sum over all units; integers stay exact.
        rows: for each unit, a row of plain numbers in addition to its scores.
        cases: measured cases, in order.
        problems: file and reason of everything left out.
        notes: oddities that change no score.
        files: number of measured frames, including those without prediction.
    """

    units: list[str]
    groups: list[str]
    sums: np.ndarray
    total: np.ndarray
    rows: list[dict[str, Any]]
    cases: list[tuple[ScoringCase, Measured]]
    problems: list[tuple[Path, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    files: int = 0


class Unscorable(UserError):
    """Error for files that cannot be scored; `problems` has the file and reason of each."""

    def __init__(self, problems: Sequence[tuple[Path, str]], where: str) -> None:
        lines = list_first([f"{path}: {reason}" for path, reason in problems])
        super().__init__(
            f"{count_of(problems, 'file')} of {where} cannot be scored:{lines}\n"
            "Correct them; data.on_error=skip scores the others and lists these."
        )
        self.problems = list(problems)


def score_cases(
    protocol: ScoreProtocol,
    listing: Cases,
    *,
    where: str,
    groups: Mapping[str, str] | None = None,
    workers: int | None = None,
    on_error: OnError = "stop",
    remedy: str = "Lower mode.workers (1: no worker processes), and run again.",
) -> ScoringResult:
    """Measure all cases and sum them by unit.

    Args:
        protocol: measures a case.
        listing: the cases, and the problems of the folders.
        where: names both folders in messages.
        groups: the group of each case by its name, for the intervals; others have their unit as a group.
        workers: number of processes; None for one per core, or only this process for few frames.
        on_error: `stop` once all files are measured, or `skip` files that cannot be scored.
        remedy: advice to the user if a process was killed.

    Raises:
        Unscorable: some files cannot be scored.
        UserError: nothing is left to score.
    """
    problems = list(listing.problems)
    cases: list[tuple[ScoringCase, Measured]] = []
    for case, result in _measure_all(protocol, listing.cases, workers, remedy):
        if isinstance(result, BadFile):
            problems.append((result.path, result.reason))
        else:
            cases.append((case, result))
    # raise late, to name all bad files at once
    if problems and on_error == "stop":
        raise Unscorable(problems, where)
    if not cases:
        first = f", such as {problems[0][0]}: {problems[0][1]}" if problems else "."
        raise UserError(f"Nothing is left to score in {where}: {count_of(problems, 'problem')}{first}")
    joined = sums_by_unit(protocol, cases)
    by_unit = _by_unit(cases)
    found, divided = _unit_groups(by_unit, groups or {}, protocol.unit)
    return ScoringResult(
        units=list(joined),
        groups=found,
        sums=np.stack([unit.astype(np.float64) for unit in joined.values()]),
        total=np.sum(list(joined.values()), axis=0),
        rows=[_row(unit) for unit in by_unit.values()],
        cases=cases,
        problems=problems,
        notes=[*listing.notes, *divided, *_unknown_notes(cases), *_bare_notes(protocol, cases)],
        files=_frames(case for case, _ in cases),
    )


def _by_unit(cases: Iterable[tuple[ScoringCase, Measured]]) -> dict[str, list[tuple[ScoringCase, Measured]]]:
    by_unit: dict[str, list[tuple[ScoringCase, Measured]]] = {}
    for case, measured in cases:
        by_unit.setdefault(case.unit, []).append((case, measured))
    return by_unit


def sums_by_unit(protocol: ScoreProtocol, cases: Iterable[tuple[ScoringCase, Measured]]) -> dict[str, np.ndarray]:
    """Return the sums (d,) of each unit."""
    return {unit: protocol.join([measured for _, measured in parts]) for unit, parts in _by_unit(cases).items()}


def _unit_groups(
    by_unit: Mapping[str, Sequence[tuple[ScoringCase, Measured]]], groups: Mapping[str, str], kind: str
) -> tuple[list[str], list[str]]:
    """Return the group of each unit, and notes; each unit is its own group if some units lie in several groups."""
    found = [{groups.get(case.name, unit) for case, _ in parts} for unit, parts in by_unit.items()]
    divided = [unit for unit, held in zip(by_unit, found, strict=True) if len(held) > 1]
    if not divided:
        return [held.pop() for held in found], []
    return [*by_unit], [
        f"The groups (data.group) divide {len(divided)} of {count_of(by_unit, kind)}, such as {divided[0]}, but each "
        f"{kind} is scored as a whole: intervals are over {kind}s. Give groups of whole {kind}s."
    ]


def _row(cases: Sequence[tuple[ScoringCase, Measured]]) -> dict[str, Any]:
    """Return a unit's details: those of its only case, or the summed numbers of several cases."""
    details = [measured.details for _, measured in cases]
    if len(details) == 1:
        return details[0]
    keys = dict.fromkeys(key for row in details for key, value in row.items() if isinstance(value, int))
    files = _frames(case for case, _ in cases)
    return {"files": files, **{key: sum(row.get(key, 0) for row in details) for key in keys}}


def _unknown_notes(cases: Sequence[tuple[ScoringCase, Measured]]) -> list[str]:
    """Return a note for each side with pixels of no class.

    Some official scripts count such pixels instead of refusing them.
    """
    notes = []
    for column, side in enumerate(("reference", "prediction")):
        key = f"unknown_pixels_{side}"
        held = [(case, measured.details[key]) for case, measured in cases if measured.details.get(key)]
        if held:
            pixels = sum(count for _, count in held)
            notes.append(
                f"{len(held)} of {count_of(cases, side)} {'holds' if len(held) == 1 else 'hold'} ids that are not "
                f"classes, in {count_of(pixels, 'pixel')}, such as {held[0][0].files[0][column]}. The official rule "
                "accepts them: void in a reference, an error in a prediction. Check them."
            )
    return notes


def _bare_notes(protocol: ScoreProtocol, cases: Sequence[tuple[ScoringCase, Measured]]) -> list[str]:
    """Return a note on references without any object, which are scored by a rule instead of a measurement."""
    bare = [case.name for case, measured in cases if measured.details.get("objects") == 0]
    if not bare:
        return []
    return [
        f"{len(bare)} of {count_of(cases, 'reference')} without any object: {join_names(bare)}. The rule: "
        f"{protocol.rules['absent_class']}. Add masks if they show objects."
    ]


def _frames(cases: Iterable[ScoringCase]) -> int:
    return sum(len(case.files) for case in cases)


def _measure_all(
    protocol: ScoreProtocol, cases: Sequence[ScoringCase], workers: int | None, remedy: str
) -> Iterable[tuple[ScoringCase, Measured | BadFile]]:
    """Return each case with its result, in order."""
    processes = workers or min(count_cores(), ceil(_frames(cases) / _FRAMES_PER_PROCESS))
    results = in_processes(protocol.measure, cases, processes, catch=BadFile, remedy=remedy)
    return Bar(results, total=len(cases), desc=f"scoring {protocol.name}", unit="file", leave=False)
