"""Decision of `resume=auto`: whether a training resumes an earlier run, and the remaining work in it.

All inputs are plain data. `past_runs.py` reads them from run folders, `cli/resuming.py` locks the folder.
"""

import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from dinoseg.utils.errors import UserError
from dinoseg.utils.wording import format_override, format_text

LENGTH = ("steps", "epochs", "max_minutes")  # keys of `trainer` that set the length of a training
# keys whose words tell no jobs of a sweep apart; lengths are compared as values
_NOT_COMPARED = {"resume", *(f"trainer.{key}" for key in LENGTH)}


class Action(Enum):
    """Use that a job makes of a run."""

    START = "start"  # train from the first step: in a new folder, or in a given one without a checkpoint
    RESUME = "resume"
    EVALUATE = "evaluate"  # the training has ended, and only its final evaluation is missing
    NOTHING = "nothing"  # the run is finished


@dataclass(frozen=True)
class Plan:
    """Plan of a training: its recipe and its length.

    Args:
        settings: values that identify the recipe, by dotted key; the seed is one of them.
        length: values of `LENGTH` that are in effect.
        options: option of each config group, for messages alone: a recipe file of another name may set equal values.
    """

    settings: Mapping[str, Any]
    length: Mapping[str, Any]
    options: Mapping[str, str] = field(compare=False)


@dataclass(frozen=True)
class PastRun:
    """State of an earlier run that has a checkpoint.

    Args:
        folder: the run folder.
        plan: of its last checkpoint.
        step: of its last checkpoint.
        end: step at which its training ended; None: it has not ended.
        is_evaluated: whether the final evaluation at `end` is written.
        words: of the command that started it.
    """

    folder: Path
    plan: Plan
    step: int
    end: int | None = None
    is_evaluated: bool = False
    words: Sequence[str] = ()

    @property
    def has_ended(self) -> bool:
        """Return whether the training has ended and was not extended since."""
        return self.step == self.end

    @property
    def remaining(self) -> Action:
        """Return what is left to do in the run."""
        if not self.has_ended:
            return Action.RESUME
        return Action.NOTHING if self.is_evaluated else Action.EVALUATE


@dataclass(frozen=True)
class StartPoint:
    """Start of a job.

    Args:
        action: the remaining work.
        folder: the existing or given run folder; None: a new one.
        checkpoint: the file to resume from; None: none.
        step: of that checkpoint.
    """

    action: Action
    folder: Path | None = None
    checkpoint: Path | None = None
    step: int = 0


def decide_in_folder(run: PastRun, plan: Plan, *, typed: Collection[str], words: Sequence[str] | None = None) -> Action:
    """Decide on the run in the folder of a command, which the user has named or which a job of a sweep has.

    Another length is no other recipe here, since the folder tells which run is meant. A job of a sweep also needs the
    words that started the run: jobs may differ in keys that no recipe holds, such as `trainer.patience`, and the
    sweep's table must not show the scores of another job.

    Args:
        run: in the folder.
        plan: of the composed config.
        typed: keys of `LENGTH` on the command line.
        words: of a job of a sweep; None: the command is none.

    Raises:
        UserError: the run is of another recipe, or of another job.
    """
    differences = [*_setting_differences(run.plan, plan)]
    is_extended = _is_extended(run, plan, typed)
    if words is not None and not differences:
        differences = [*_word_differences(run.words, words)]
        differences += [] if is_extended else _length_differences(run.plan, plan)
    if differences:
        named = "; ".join(differences)
        if words is not None:
            raise UserError(
                f"resume=auto: {run.folder} holds the run of another job: {named}. A sweep's job resumes in the folder "
                "of its number: repeat the swept values in their order, new ones last, or set another hydra.sweep.dir."
            )
        raise UserError(
            f"resume=auto: {run.folder} holds a run of another recipe: {named}. Set these keys as in that run, or "
            f"choose another run folder. To change the run, set {shlex.quote(f'resume={run.folder}')}."
        )
    return Action.RESUME if is_extended else run.remaining


def _is_extended(run: PastRun, plan: Plan, typed: Collection[str]) -> bool:
    """Return whether the command line sets a greater length than that of a run, or none: the training refuses it."""
    there = run.plan.length
    here = {key: value for key, value in plan.length.items() if key in typed and value != there.get(key)}
    done = {**there, "steps": run.step}
    return any(not isinstance(value, int | float) or value > done.get(key, 0) for key, value in here.items())


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


def _word_differences(there: Sequence[str], here: Sequence[str]) -> Iterator[str]:
    for word in sorted({*there} ^ {*here}):
        if word.lstrip("+").partition("=")[0] not in _NOT_COMPARED:
            yield f"{format_text(word)} only {'here' if word in here else 'there'}"


def _length_differences(there: Plan, here: Plan) -> Iterator[str]:
    for key in LENGTH:
        if there.length.get(key) != here.length.get(key):
            yield _difference(f"trainer.{key}", *({f"trainer.{key}": plan.length.get(key)} for plan in (there, here)))


def _difference(key: str, there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    before, now = (format_text(format_override(values.get(key))) for values in (there, here))
    return f"{key} ({before} there, {now} here)"
