"""Folders of the run of a command, and of earlier runs."""

import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from hydra.types import RunMode

from dinoseg.config.plain import to_container

_DEFAULT_NAME = re.compile(r"[a-z]+_\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d")  # names of run folders by cfg/hydra/run.yaml
_TIME = re.compile(r"\$\{(dinoseg\.)?now:")  # resolvers of the time


class RunLocation(NamedTuple):
    """Folders of the run of a command, and of earlier runs.

    Attributes:
        folder: the run folder that the config names.
        root: folder below which earlier runs of the recipe have the same depth; in a multirun the sweep's folder.
        is_given: whether a user's command line or config file names this very folder (a multirun: the sweep's).
        in_sweep: whether the command is a multirun.
    """

    folder: Path
    root: Path
    is_given: bool = False
    in_sweep: bool = False


def locate_runs(hydra: Any, folder: Path) -> RunLocation:
    """Return where a command writes its run, by Hydra's own config.

    Args:
        hydra: the config's node of that name, not resolved yet.
        folder: the run folder.
    """
    in_sweep = hydra.get("mode") == RunMode.MULTIRUN
    text = to_container(hydra["sweep" if in_sweep else "run"])["dir"].rstrip("/")
    folder = folder.absolute()
    # a name with the time is another folder for each command: the user chose where runs lie, not which one this is
    time = _TIME.search(text)
    if in_sweep:
        return RunLocation(folder, Path(os.path.abspath(hydra.sweep.dir)), time is None, in_sweep)
    below = text[time.start() :].count("/") if time else 0
    return RunLocation(folder, folder.parents[below], time is None)


def has_default_name(folder: Path) -> bool:
    """Return whether a run folder is named by mode and time, as `cfg/hydra/run.yaml` does."""
    return _DEFAULT_NAME.fullmatch(folder.name) is not None


def move_below_recipe(folder: Path, typed: str, recipe: Any) -> Path:
    """Return the run folder of a mode that uses a checkpoint: below the checkpoint's recipe, unless its name was typed.

    Args:
        folder: as the config names it.
        typed: recipe of the command line.
        recipe: that of the checkpoint. It comes from a file, so only a plain name is used as a folder.
    """
    is_ours = folder.parent.name == typed and has_default_name(folder)
    is_plain = isinstance(recipe, str) and re.fullmatch(r"\w[\w-]*", recipe)
    return folder.parent.with_name(recipe) / folder.name if is_ours and is_plain else folder
