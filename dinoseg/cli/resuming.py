"""Start of a training with `resume=auto`: the run that it resumes, the lock of its folder, and what the user reads."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig

from dinoseg.checkpoints.auto_resume import LENGTH, Action, PastRun, Plan, StartPoint, decide_in_folder
from dinoseg.checkpoints.past_runs import find_runs, last_checkpoint, plan_of, read_run
from dinoseg.config.plain import flatten
from dinoseg.experiment.models import ModelBuilder
from dinoseg.experiment.recipe import config_description
from dinoseg.runs.folder import RunFolder
from dinoseg.runs.location import RunLocation
from dinoseg.utils.errors import UserError
from dinoseg.utils.files import is_sweep_folder
from dinoseg.utils.wording import printable

PATIENCE = 10.0  # seconds to wait for the process that writes to a run: that of a requeued job may still be ending


def find_start(cfg: DictConfig, overrides: Sequence[Override], location: RunLocation, run: RunFolder) -> StartPoint:
    """Return where a training with `resume=auto` starts; enter its run folder, unless it is a new one.

    A given folder, or that of a sweep's job, decides alone. Else the newest unfinished run of the same plan is resumed.

    Args:
        cfg: composed from the command line.
        overrides: the command line's assignments.
        location: where this command and earlier ones write their runs.
        run: the folder of this job.

    Raises:
        UserError: the folder holds a run of another recipe or an unreadable checkpoint, or is in use.
    """
    plan = plan_of(config_description(ModelBuilder(cfg)))
    is_fixed = location.is_given or location.in_sweep
    past = _enter_given(location, run) if is_fixed else _enter_unfinished(plan, location, run)
    if past is None:
        return StartPoint(Action.START, run.path if is_fixed else None)
    action = past.remaining
    if is_fixed:
        typed = dict(flatten({override.key_or_group: override.value() for override in overrides}))
        lengths = [key for key in LENGTH if f"trainer.{key}" in typed]
        words = [str(override.input_line) for override in overrides] if location.in_sweep else None
        action = decide_in_folder(past, plan, typed=lengths, words=words)
    _report(action, run.path, past.step, in_sweep=location.in_sweep)
    return StartPoint(action, run.path, last_checkpoint(run.path), past.step)


def _enter_given(location: RunLocation, run: RunFolder) -> PastRun | None:
    """Enter a given folder, or that of a sweep's job, and return its run; None: it has no checkpoint."""
    folder = location.folder
    if is_sweep_folder(folder):
        raise UserError(
            f"resume=auto: {folder} holds the jobs of a sweep. Choose another run folder; to resume the sweep, repeat "
            f"its command with {shlex.quote(f'hydra.sweep.dir={folder}')}."
        )
    key = "hydra.sweep.dir" if location.in_sweep else "run folder"
    run.enter(folder, wait=PATIENCE, remedy=f"choose another {key}")
    try:
        past = read_run(folder)
    except UserError as error:
        raise UserError(f"resume=auto: {error} To start again in this folder, remove the file.") from error
    if past is None:
        _print_note(f"{folder} holds no checkpoint: the training starts there.")
    return past


def _enter_unfinished(plan: Plan, location: RunLocation, run: RunFolder) -> PastRun | None:
    """Enter the folder of the newest unfinished run of a plan and return the run; None: there is none to resume."""
    runs = find_runs(location.root, len(location.folder.relative_to(location.root).parts))
    found = next((past for past in runs if _is_unfinished(past, plan)), None)
    if found is None:
        reason = f"no unfinished run of this recipe and length in {location.root}"
    elif not run.try_to_enter(found.folder, wait=PATIENCE):
        reason = f"another process is still writing to {found.folder}"
    else:
        past = read_run(found.folder)  # another process may have changed the run until then
        if past is not None and _is_unfinished(past, plan):
            return past
        run.release()
        reason = f"another process has finished {found.folder}"
    _print_note(f"{reason}: starting a new run.")
    return None


def _is_unfinished(past: PastRun, plan: Plan) -> bool:
    return past.plan == plan and past.remaining is not Action.NOTHING


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
