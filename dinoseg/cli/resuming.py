"""Search of `resume=auto`: the runs that a command may resume, the lock of the chosen one, and what the user reads."""

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig

from dinoseg.checkpoints.auto_resume import (
    LENGTH,
    Action,
    Decision,
    Request,
    StartPoint,
    decide,
    decide_in_folder,
    find_near_misses,
    scheduler_job,
)
from dinoseg.checkpoints.past_runs import (
    compared_words,
    find_runs,
    last_checkpoint,
    plan_of,
    read_run,
)
from dinoseg.experiment.models import ModelBuilder
from dinoseg.experiment.recipe import config_description
from dinoseg.runs.folder import RunFolder
from dinoseg.runs.location import RunLocation, remembered_folders
from dinoseg.utils.wording import printable

PATIENCE = 10.0  # seconds to wait for the process that writes to a run: that of a requeued job may still be ending


def find_start(cfg: DictConfig, overrides: Sequence[Override], location: RunLocation, run: RunFolder) -> StartPoint:
    """Return where a training with `resume=auto` starts; enter its run folder, unless it is a new one.

    Args:
        cfg: composed from the command line.
        overrides: the command line's assignments.
        location: where this command and earlier ones write their runs.
        run: the folder of this job.

    Raises:
        UserError: the given folder holds a run of another recipe or an unreadable checkpoint, or is in use.
    """
    plan = plan_of(config_description(ModelBuilder(cfg)))
    typed = {override.key_or_group.removeprefix("trainer."): override.value() for override in overrides}
    typed_length = {key: typed[key] for key in LENGTH if typed.get(key) is not None}
    words = compared_words(str(override.input_line) for override in overrides)
    request = Request(plan, typed_length, scheduler_job(os.environ), location.in_sweep, words)
    if location.is_given and not location.in_sweep:
        run.enter(location.folder, wait=PATIENCE, remedy="choose another run folder")
        decision = decide_in_folder(request, run.path, read_run(run.path))
    else:
        decision = _decide_among_runs(request, location, Path(cfg.cache_dir).expanduser(), run)
        if decision.run is None:
            return StartPoint(Action.START, plan=plan, job=request.job)
    if decision.run is None or decision.run.step is None:
        if decision.run is not None:
            _print_note(f"{run.path} holds no checkpoint yet: the training starts there.")
        return StartPoint(Action.START, run.path, plan=plan, job=request.job)
    step = decision.run.step
    _report(decision.action, run.path, step, in_sweep=location.in_sweep)
    return StartPoint(decision.action, run.path, last_checkpoint(run.path), step, plan, request.job)


def _decide_among_runs(request: Request, location: RunLocation, cache_dir: Path, run: RunFolder) -> Decision:
    """Choose among the runs of a folder, and enter the folder of the chosen one."""
    runs = find_runs(location.root, () if location.in_sweep else remembered_folders(cache_dir))
    decision = decide(request, runs)
    if decision.run is None and (location.is_given or not location.in_sweep):
        which = "run of this command" if location.in_sweep else "unfinished run of this recipe and length"
        _print_note(f"no {which} in {location.root}: starting a new run.")
        for near_miss in find_near_misses(request, runs):
            _print_note(near_miss)
    return decision if decision.run is None else _enter_chosen(request, decision.run.folder, run)


def _enter_chosen(request: Request, folder: Path, run: RunFolder) -> Decision:
    """Enter the folder of a chosen run and decide again: another process may have changed the run until then."""
    if not run.try_to_enter(folder, wait=PATIENCE):
        _print_note(f"another process is still writing to {folder}: starting a new run.")
        return Decision(Action.START)
    past = read_run(folder)
    decision = decide(request, [] if past is None else [past])
    if decision.run is None:
        run.release()
        _print_note(f"another process has finished {folder}: starting a new run.")
    return decision


def _report(action: Action, folder: Path, step: int, *, in_sweep: bool) -> None:
    if action is Action.EVALUATE:
        _print_note(f"{folder} has ended at step {step}: writing its final evaluation.")
    elif action is Action.NOTHING and in_sweep:
        _print_note(f"{folder} is finished at step {step}: its result is reused.")
    elif action is Action.NOTHING:
        word = shlex.quote(f"resume={folder}")
        _print_note(f"{folder} is finished at step {step}. To train on: {word} trainer.steps=MORE")


def _print_note(message: str) -> None:
    print(printable(f"resume=auto: {message}"), file=sys.stderr)
