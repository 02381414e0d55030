"""Folders of the run of a command, and of earlier runs."""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from hydra.types import RunMode
from omegaconf import OmegaConf

from dinoseg.config.plain import to_container
from dinoseg.utils import forms
from dinoseg.utils.atomic import create_cache_dir
from dinoseg.utils.errors import UserError
from dinoseg.utils.files import open_to_append

_SHIPPED = Path(__file__).parents[1] / "cfg/hydra/run.yaml"
_DEFAULT_NAME = re.compile(r"[a-z]+_\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d")  # names of run folders by that file


class RunLocation(NamedTuple):
    """Folders of the run of a command, and of earlier runs.

    Attributes:
        folder: the run folder that the config names.
        root: folder of all runs, `outputs` by default; in a multirun the sweep's folder.
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
    kind = "sweep" if in_sweep else "run"
    default = to_container(OmegaConf.load(_SHIPPED))[kind]["dir"]
    text = to_container(hydra[kind])["dir"]
    # a name with the time is another folder for each command: the user chose where runs lie, not which one this is
    is_given = text != default and "${now:" not in text
    if in_sweep:
        root = Path(hydra.sweep.dir)
    else:
        root = Path((default if is_given else text).partition("${")[0].rpartition("/")[0] or folder.parent)
    return RunLocation(folder.absolute(), Path(os.path.abspath(root)), is_given, in_sweep)


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


def remember_folder(cache_dir: Path, folder: Path) -> None:
    """Record a run folder that the user named, so that the same command finds it from this folder without the name."""
    path, line = _folder_list(cache_dir), json.dumps(str(folder.absolute())) + "\n"
    with suppress(OSError, UserError):  # a cache that cannot be written to is no reason not to train
        create_cache_dir(cache_dir)
        if not path.exists() or line.encode() not in forms.read_regular(path):
            with open_to_append(path) as file:
                file.write(f"\n{line}")  # a full disk may have cut the line before


def remembered_folders(cache_dir: Path) -> Iterator[Path]:
    """Yield the run folders that commands in the current folder have named and that still exist."""
    with suppress(OSError, UserError, forms.SchemaError):
        for line in forms.read_regular(_folder_list(cache_dir)).splitlines():
            with suppress(forms.SchemaError):
                folder = Path(forms.parse_json(line, forms.text))
                if folder.is_dir():
                    yield folder


def _folder_list(cache_dir: Path) -> Path:
    here = hashlib.sha256(os.fsencode(Path.cwd())).hexdigest()
    return cache_dir / f"runs_{here[:16]}.jsonl"
