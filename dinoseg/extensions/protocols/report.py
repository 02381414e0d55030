"""Output of official scores: printed table, warnings and unscorable files; no torch."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dinoseg.extensions.protocols.contract import ScoreProtocol
from dinoseg.extensions.protocols.folders import ScoringResult
from dinoseg.extensions.protocols.summary import summary
from dinoseg.report.table import few_units, scores_table
from dinoseg.utils.atomic import write_json
from dinoseg.utils.wording import count_of

logger = logging.getLogger(__name__)
_NOTES = 10  # printed notes; the file has all


def report(protocol: ScoreProtocol, scored: ScoringResult, path: Path) -> dict[str, Any]:
    """Print the scores of predictions that a mode has just made, write them to `path`, and return them."""
    result = result_of(protocol, scored, path)
    write_json(path, result)
    print(f"\n{scores_table(result)}")
    return result


def result_of(protocol: ScoreProtocol, scored: ScoringResult, path: Path) -> dict[str, Any]:
    """Return the scores for the file `path`, and warn of notes, unscorable files and too few units."""
    for note in scored.notes[:_NOTES]:
        logger.warning("%s", note)
    if len(scored.notes) > _NOTES:
        logger.warning("%s in %s.", count_of(len(scored.notes) - _NOTES, "more note"), path)
    if scored.problems:
        count = count_of(scored.problems, "file")
        logger.warning("%s could not be scored and are left out; see `problems` in %s.", count, path)
    result = summary(protocol, scored)
    held = any(limits is not None for limits in result["ci95"].values())
    if held and (few := few_units(result["n"], result["unit"])):
        logger.warning("%s", few)
    return result


def write_problems(out_dir: Path, problems: Mapping[Path, Sequence[tuple[Path, str]]]) -> Path:
    """Write the unscorable files below each folder of predictions to `problems.json`; return its path."""
    rows = [
        {"prediction": str(folder), "file": str(path), "reason": reason}
        for folder, faults in problems.items()
        for path, reason in faults
    ]
    write_json(out_dir / "problems.json", {"problems": rows})
    return out_dir / "problems.json"
