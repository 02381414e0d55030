"""Decision of `resume=auto`: which earlier run a training resumes, and the remaining work in it.

All inputs are plain data. `past_runs.py` reads them from run folders, `cli/resuming.py` locks the chosen folder.
"""

import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from dinoseg.utils.errors import UserError
from dinoseg.utils.wording import format_override, format_text

LENGTH = ("steps", "epochs", "max_minutes")  # keys of `trainer` that set the length of a training
_MAX_DIFFERENCES = 3  # a run with more differing keys is another experiment, not a near miss
_MAX_NEAR_MISSES = 3  # reported, the newest ones


class Action(Enum):
    """Use that a job makes of the chosen run."""

    START = "start"  # train from the first step: in a new folder, or in that of a run without a checkpoint
    RESUME = "resume"
    EVALUATE = "evaluate"  # the training has ended, and only its final evaluation is missing
    NOTHING = "nothing"  # the run is finished


@dataclass(frozen=True)
class Plan:
    """Plan of a training: its recipe and its length.

    Args:
        settings: values that identify the recipe, by dotted key; the seed is one of them.
        length: values of `LENGTH` that are in effect.
        options: option of each config group, for messages.
    """

    settings: Mapping[str, Any]
    length: Mapping[str, Any]
    options: Mapping[str, str]

    def equals(self, other: "Plan") -> bool:
        """Return whether another plan has the same recipe and length."""
        return self.settings == other.settings and self.length == other.length


@dataclass(frozen=True)
class PastRun:
    """State of an earlier run.

    Args:
        folder: the run folder.
        plan: of its last checkpoint; without one, of the command that started the run.
        jobs: identifiers of the scheduler jobs that started or resumed it, see `scheduler_job`.
        in_sweep: whether a multirun started it.
        step: of its last checkpoint; None: it has none.
        end: step at which its training ended; None: it has not ended.
        is_evaluated: whether the final evaluation at `end` is written.
        words: of the command that started it, without `resume`.
    """

    folder: Path
    plan: Plan
    jobs: Collection[str] = ()
    in_sweep: bool = False
    step: int | None = None
    end: int | None = None
    is_evaluated: bool = False
    words: Collection[str] = frozenset()

    @property
    def has_ended(self) -> bool:
        """Return whether the training has ended and was not extended since."""
        return self.step is not None and self.step == self.end

    @property
    def is_finished(self) -> bool:
        """Return whether the training has ended and its final evaluation is written."""
        return self.has_ended and self.is_evaluated


@dataclass(frozen=True)
class Request:
    """Plan and typed keys of a command.

    Args:
        plan: of the composed config.
        typed_length: keys of `LENGTH` on the command line.
        job: identifier of the scheduler job that runs the command, if any.
        in_sweep: whether the command is a job of a multirun.
        words: of the command line, without `resume`.
    """

    plan: Plan
    typed_length: Mapping[str, Any]
    job: str | None = None
    in_sweep: bool = False
    words: Collection[str] = frozenset()


@dataclass(frozen=True)
class Decision:
    """An action and its run; None: a new run."""

    action: Action
    run: PastRun | None = None


@dataclass(frozen=True)
class StartPoint:
    """Start of a job.

    Args:
        action: the remaining work.
        folder: the existing or given run folder; None: a new one.
        checkpoint: the file to resume from; None: none.
        step: of that checkpoint.
        plan: of the command, if `resume=auto` has searched for its run.
        job: identifier of the scheduler job.
    """

    action: Action
    folder: Path | None = None
    checkpoint: Path | None = None
    step: int = 0
    plan: Plan | None = None
    job: str | None = None


def decide(request: Request, runs: Sequence[PastRun]) -> Decision:
    """Choose among all runs in the searched folder, newest first.

    A job of a sweep takes the run of the same recipe, seed, length and words, finished or not: cells may differ in keys
    that no recipe holds, such as `trainer.patience`. Any other command takes a run of the same recipe and length if the
    same scheduler job has started it, else the newest unfinished one outside sweeps.
    """
    equal = [run for run in runs if run.plan.equals(request.plan)]
    if request.in_sweep:
        chosen = [run for run in equal if run.words == request.words]
    else:
        own = [run for run in equal if request.job in run.jobs]
        chosen = own or [run for run in equal if run.step is not None and not run.in_sweep and not run.is_finished]
    return Decision(_next_action(chosen[0]), chosen[0]) if chosen else Decision(Action.START)


def decide_in_folder(request: Request, folder: Path, run: PastRun | None) -> Decision:
    """Decide on the run in a folder that the user named; None: the folder holds none.

    Another length is no other recipe here: the user named the run.

    Raises:
        UserError: the checkpoint is of another recipe.
    """
    if run is None or run.step is None:
        return Decision(Action.START)
    if differences := [*_setting_differences(run.plan, request.plan)]:
        raise UserError(
            f"resume=auto: {folder} holds a run of another recipe: {'; '.join(differences)}. Set these keys as in that "
            f"run, or choose another run folder. To change the run, set {shlex.quote(f'resume={folder}')}."
        )
    action = _next_action(run)
    return Decision(Action.RESUME if action != Action.RESUME and _is_extended(run, request) else action, run)


def find_near_misses(request: Request, runs: Sequence[PastRun]) -> list[str]:
    """Return a text for each of the newest runs that a command almost resumes, with the reason.

    For a job of a sweep these are runs that differ in words only, for other commands runs outside sweeps.
    """
    found = []
    for run in runs:
        if request.in_sweep:
            words = sorted({*run.words} ^ {*request.words})
            if run.plan.equals(request.plan) and len(words) <= 2 * _MAX_DIFFERENCES:
                found.append(f"not resumed: {run.folder} differs in {' '.join(words)}")
            continue
        differences = [*_setting_differences(run.plan, request.plan), *_length_differences(run.plan, request.plan)]
        if run.in_sweep or run.step is None or len(differences) > _MAX_DIFFERENCES:
            continue
        if differences:
            found.append(f"not resumed: {run.folder} differs in {'; '.join(differences)}")
        elif run.is_finished:
            word = shlex.quote(f"resume={run.folder}")
            found.append(f"not resumed: {run.folder} is finished; {word} with a larger length trains on")
    return found[:_MAX_NEAR_MISSES]


def scheduler_job(environment: Mapping[str, str]) -> str | None:
    """Return the identifier of the job that runs a process, which a requeue or restart keeps; None: there is none.

    A Slurm job is identified by its number, a task of an array by those of array and task, torchrun by its run id.
    """
    array, task = (environment.get(f"SLURM_ARRAY_{name}_ID") for name in ("JOB", "TASK"))
    number = f"{array}_{task}" if array and task else environment.get("SLURM_JOB_ID")
    if number:
        return f"slurm {environment.get('SLURM_CLUSTER_NAME', '')} {number}"
    # torchrun without --standalone and --rdzv-id calls every run "none"
    torchrun = environment.get("TORCHELASTIC_RUN_ID", "none")
    return None if torchrun == "none" else f"torchrun {torchrun}"


def _next_action(run: PastRun) -> Action:
    if run.step is None:
        return Action.START
    if run.is_finished:
        return Action.NOTHING
    return Action.EVALUATE if run.has_ended else Action.RESUME


def _is_extended(run: PastRun, request: Request) -> bool:
    """Return whether the command line sets another length than that of an ended run, and more steps if any."""
    steps = request.typed_length.get("steps")
    is_other = any(run.plan.length.get(key) != value for key, value in request.typed_length.items())
    return is_other and (steps is None or run.step is None or steps > run.step)


def _setting_differences(there: Plan, here: Plan) -> Iterator[str]:
    """Yield each key of the recipe that differs; a group with another option counts as one key."""
    groups = [group for group, option in here.options.items() if there.options.get(group) != option]
    # a recipe file of another name may set equal values
    keys = [key for key in {**here.settings, **there.settings} if here.settings.get(key) != there.settings.get(key)]
    for group in groups:
        below = [key for key in keys if key.split(".")[0] == group]
        keys = [key for key in keys if key not in below]
        if below:
            yield _difference(group, there.options, here.options)
    yield from (_difference(key, there.settings, here.settings) for key in keys)


def _length_differences(there: Plan, here: Plan) -> Iterator[str]:
    for key in LENGTH:
        if there.length.get(key) != here.length.get(key):
            yield _difference(f"trainer.{key}", *({f"trainer.{key}": plan.length.get(key)} for plan in (there, here)))


def _difference(key: str, there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    before, now = (format_text(format_override(values.get(key))) for values in (there, here))
    return f"{key} ({before} there, {now} here)"
