"""The file that remembers a search, held against what is searched for now; optuna believes whatever stands there."""

import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dinoseg.utils.errors import UserError
from dinoseg.utils.forms import Misshapen, read_regular
from dinoseg.utils.wording import printable

_WORDS, _FIXED = "words", "fixed"  # what a study is told of itself
_FIRST = b'{"op_code":0,'  # how optuna's file begins: a study is made
_MOST_BYTES = 2**30  # of its file: a job takes some thousands
_REMEDY = "Choose another hydra.sweeper.storage, or remove the file."


def open_study(path: Path, direction: str, space: Mapping[str, Any], words: Sequence[str], fixed: Sequence[str]) -> Any:
    """Return the search that a file holds, or a new one; jobs of other fixed words are told.

    Args:
        path: of the file; this process is the only one that has it.
        direction: maximize or minimize.
        space: keys to what their values may be, as optuna says it.
        words: what makes two searches the same.
        fixed: the other words of the command line.

    Raises:
        UserError: it holds something else, another search, or is damaged.
    """
    import optuna
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock, JournalStorage

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    _drop_cut_line(path)
    # of a process that was killed as it wrote: optuna would wait for it, and where the path is relative for ever
    path.with_name(f"{path.name}.lock").unlink(missing_ok=True)
    try:
        study = optuna.create_study(
            # its usual lock is a link, which Windows lets administrators alone make
            storage=JournalStorage(JournalFileBackend(str(path), JournalFileOpenLock(str(path)))),
            study_name="search",
            direction=direction,  # type: ignore[arg-type, unused-ignore]
            load_if_exists=True,
        )
        trials = study.get_trials(deepcopy=False)
        known = study.user_attrs.get(_WORDS, [] if trials else words)
        if known == words:
            if [found.name.lower() for found in study.directions] != [direction]:
                raise ValueError("it goes in another direction")
            _check(trials, space)
        changed = {*study.user_attrs.get(_FIXED, fixed)} ^ {*fixed}
    except OSError:
        raise
    except Exception as error:  # whatever its lines happen to mean to optuna
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error!s:.200}). {_REMEDY}") from error
    if known != words:
        raise UserError(f"{path} holds another search ({known}) than this one ({words}). {_REMEDY}")
    if changed and trials:
        print(
            printable(f"Earlier jobs of this search differ in {', '.join(sorted(changed))}: do their scores compare?"),
            file=sys.stderr,
        )
    study.set_user_attr(_WORDS, words)
    study.set_user_attr(_FIXED, fixed)
    return study


def _drop_cut_line(path: Path) -> None:
    """Remove what a process that was killed, or a full disk, has left of a line: optuna would refuse the file."""
    if not path.exists():
        return
    try:
        text = read_regular(path, _MOST_BYTES)
    except Misshapen as error:
        raise UserError(f"hydra.sweeper.storage={path} is no search ({error}). {_REMEDY}") from None
    if text[: len(_FIRST)] != _FIRST[: len(text)]:
        raise UserError(f"hydra.sweeper.storage={path} holds something else than a search. Choose another file.")
    if not text.endswith(b"\n"):
        os.truncate(path, text.rfind(b"\n") + 1)


def _check(trials: Sequence[Any], space: Mapping[str, Any]) -> None:
    """Refuse what this search cannot have written.

    Raises:
        Exception: of any kind.
    """
    for trial in trials:
        trial._validate()
        if trial.value is not None and not math.isfinite(trial.value):
            raise ValueError(f"job {trial.number} has the score {trial.value}")
        drawn = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
        for key, value in drawn.items():
            if trial.distributions.get(key, space[key]) != space[key]:
                raise ValueError(f"{key} of job {trial.number} was drawn from other values")
            if not space[key]._contains(space[key].to_internal_repr(value)):
                raise ValueError(f"job {trial.number} has {key}={value}")
