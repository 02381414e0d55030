"""Earlier runs as `resume=auto` sees them: their last checkpoints, and the files that record their end."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from dinoseg.checkpoints.auto_resume import LENGTH, PastRun, Plan
from dinoseg.config.plain import flatten
from dinoseg.experiment.recipe import recipe_of
from dinoseg.runs.folder import command_line
from dinoseg.training import checkpoint
from dinoseg.training.description import DESCRIBED_GROUPS
from dinoseg.training.end_record import read_end
from dinoseg.utils.errors import UserError
from dinoseg.utils.forms import as_read_back
from dinoseg.utils.wording import printable

_LAST = f"{checkpoint.CHECKPOINT_FOLDER}/last.safetensors"
_OPTIONS = tuple(group for group in DESCRIBED_GROUPS if group != "hparam")  # a recipe of another name may be the same


def plan_of(info: Mapping[str, Any]) -> Plan:
    """Return the plan in the description of a checkpoint, or in that of a config."""
    trainer = as_read_back(info["config"]["trainer"])
    given = {key: trainer[key] for key in LENGTH if trainer.get(key) is not None}
    if "epochs" in given:  # they replace the steps of a recipe
        given.pop("steps", None)
    options = {group: info["choices"][group] for group in _OPTIONS}
    return Plan(dict(flatten(recipe_of(info))), given, options)


def read_result(run: Path) -> dict[str, Any]:
    """Return the result of a finished run, with its current folder."""
    return {**read_end(run)["result"], "run": str(run)}


def read_run(folder: Path) -> PastRun | None:
    """Return the state of the run in a folder; None if it has no last checkpoint and is not finished.

    Raises:
        UserError: its checkpoint cannot be read.
    """
    last = last_checkpoint(folder)
    end = read_end(folder)
    is_evaluated = end["result"] is not None
    # users remove `last` of finished runs to save space
    path = last.with_stem("best") if is_evaluated and not last.exists() else last
    if not path.is_file():
        return None
    info = checkpoint.describe(path)
    step = info["progress"]["step"] if path == last else end["step"]
    return PastRun(folder, plan_of(info), step, end["step"], is_evaluated, command_line(folder))


def find_runs(root: Path, depth: int) -> Iterator[PastRun]:
    """Yield the runs with a checkpoint so many folders below another one, newest first; report unreadable ones."""
    dated = []
    for path in root.glob("*/" * depth + _LAST):
        with suppress(OSError):  # removed in the meantime
            dated.append((path.stat().st_mtime, path.parents[1]))
    for _, folder in sorted(dated, reverse=True):
        try:
            run = read_run(folder)
        except UserError as error:
            print(printable(f"resume=auto: skipped: {error}"), file=sys.stderr)
        else:
            if run is not None:
                yield run


def last_checkpoint(folder: Path) -> Path:
    """Return the path of the checkpoint from which the run in a folder resumes."""
    return folder / _LAST
