"""Lookup of the checkpoint that `resume` names, or with `auto` of the newest one of the same recipe."""

import os
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from omegaconf import DictConfig

from dinoseg.experiment.folder import is_locked
from dinoseg.experiment.models import ModelBuilder
from dinoseg.experiment.recipe import config_description, recipe_of
from dinoseg.training import checkpoint
from dinoseg.utils.errors import UserError
from dinoseg.utils.wording import printable

PATIENCE = 10  # seconds that resume=auto waits for another process to end its run


def resumed_checkpoint(cfg: DictConfig, out_dir: Path, prefer: str) -> Path | None:
    """Return the checkpoint that `resume` names; None for `auto` if no run of this recipe has one yet.

    Runs have the same recipe if they differ only in length and intervals. For `auto`, a run that another process is
    still writing to after `PATIENCE` seconds is skipped, and so is an unreadable file; both are reported.

    Args:
        cfg: composed from the command line.
        out_dir: folder of the new run, below the recipe's folder.
        prefer: `best` or `last`.
    """
    if cfg.resume != "auto":
        return checkpoint.find(cfg.resume, prefer)
    recipe_folder = next((folder for folder in out_dir.parents if folder.name == cfg.choices.hparam), out_dir.parent)
    recipe = recipe_of(config_description(ModelBuilder(cfg)))
    for path in _newest_first(recipe_folder.rglob(f"{checkpoint.FOLDER}/{prefer}.safetensors")):
        try:
            is_same = recipe_of(checkpoint.describe(path)) == recipe
        except UserError as error:
            _say(f"skipped: {error}")
            continue
        if is_same and _is_free(path.parent.parent):
            return path
    return None


def _newest_first(paths: Iterable[Path]) -> list[Path]:
    dated_paths = []
    for path in paths:
        with suppress(OSError):  # removed in the meantime
            dated_paths.append((path.stat().st_mtime, path))
    return [path for _, path in sorted(dated_paths, reverse=True)]


def _is_free(run: Path) -> bool:
    """Return whether a run can be resumed, waiting up to `PATIENCE` seconds for a process that is shutting down."""
    if os.environ.get("RANK", "0") != "0":
        return True  # under torchrun rank 0 decides, and may already hold the lock
    deadline = time.monotonic() + PATIENCE
    if not is_locked(run):
        return True
    _say(f"another process is writing to {run}: waiting up to {PATIENCE} seconds for it to end.")
    while time.monotonic() < deadline:
        time.sleep(0.1)
        if not is_locked(run):
            return True
    _say(f"skipped: another process is still writing to {run}.")
    return False


def _say(message: str) -> None:
    print(printable(f"resume=auto: {message}"), file=sys.stderr)
