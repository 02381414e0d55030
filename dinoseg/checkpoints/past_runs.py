"""Earlier runs as `resume=auto` sees them, and the files in a run folder that record its origin and its end."""

import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from dinoseg.checkpoints.auto_resume import LENGTH, PastRun, Plan
from dinoseg.config.plain import flatten
from dinoseg.experiment.recipe import recipe_of
from dinoseg.runs.folder import LOG, ORIGIN, command_line
from dinoseg.training import checkpoint
from dinoseg.training.description import DESCRIBED_GROUPS
from dinoseg.training.end_record import read_end, read_record
from dinoseg.utils.errors import UserError
from dinoseg.utils.forms import as_read_back
from dinoseg.utils.wording import printable

_MAX_DEPTH = 5  # folders below the searched one: outputs/RECIPE/SWEEP/JOB, and one more
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
    """Return the state of the run in a folder; None if it has neither a checkpoint nor a record of its plan.

    Raises:
        UserError: its checkpoint cannot be read.
    """
    origins = [origin for path in sorted(folder.glob(f"config*/{ORIGIN}")) if (origin := read_record(path))]
    jobs = frozenset(origin["job"] for origin in origins if origin["job"])
    in_sweep = any(origin["sweep"] for origin in origins)
    words = compared_words(command_line(folder))
    last = last_checkpoint(folder)
    if last.is_file():
        info, end = checkpoint.describe(last), read_end(folder)
        step, is_evaluated = info["progress"]["step"], end["result"] is not None
        return PastRun(folder, plan_of(info), jobs, in_sweep, step, end["step"], is_evaluated, words)
    plans = [origin["plan"] for origin in origins if origin["plan"]]
    return PastRun(folder, Plan(**plans[-1]), jobs, in_sweep, words=words) if plans else None


def compared_words(command: Iterable[str]) -> frozenset[str]:
    """Return the words of a command that tell jobs of a sweep apart: all but `resume`."""
    return frozenset(word for word in command if word.lstrip("+").partition("=")[0] != "resume")


def find_runs(root: Path, others: Iterable[Path] = ()) -> list[PastRun]:
    """Return all runs below a folder, and those in other folders, newest first; report unreadable checkpoints."""
    dated = []
    for folder in dict.fromkeys([*_run_folders(root, _MAX_DEPTH), *others]):
        with suppress(OSError):  # removed in the meantime
            last = last_checkpoint(folder)
            dated.append(((last if last.exists() else folder).stat().st_mtime, folder))
    runs = []
    for _, folder in sorted(dated, reverse=True):
        try:
            run = read_run(folder)
        except UserError as error:
            print(printable(f"resume=auto: skipped: {error}"), file=sys.stderr)
        else:
            runs += [run] if run is not None else []
    return runs


def _run_folders(folder: Path, depth: int) -> Iterator[Path]:
    """Yield the run folders at and below a folder, without entering them or hidden folders."""
    try:
        entries = list(os.scandir(folder))
    except OSError:
        return
    if {LOG, checkpoint.CHECKPOINT_FOLDER} & {entry.name for entry in entries}:
        yield folder
    elif depth:
        for entry in entries:
            if not entry.name.startswith(".") and entry.is_dir(follow_symlinks=False):
                yield from _run_folders(Path(entry.path), depth - 1)


def last_checkpoint(folder: Path) -> Path:
    """Return the path of the checkpoint from which the run in a folder resumes."""
    return folder / checkpoint.CHECKPOINT_FOLDER / "last.safetensors"
