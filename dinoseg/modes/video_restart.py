"""Going on with an evaluation of videos that was stopped: masks of whole videos are taken over from its run folder."""

import json
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from dinoseg.config import plain
from dinoseg.errors import UserError
from dinoseg.inference.results import whole_folder
from dinoseg.wording import listed

RECORD = "tracking.json"  # in a run folder: what its masks depend on


def record_of(cfg: DictConfig, settings: Mapping[str, Any], *, split: str, given: str) -> dict[str, Any]:
    """Return what the masks of a run depend on, as JSON gives it back.

    Args:
        cfg: the whole config.
        settings: of its tracker.
        split: of the data.
        given: which masks the tracker is shown.
    """
    place = {key: plain(cfg.data.clips[key], resolve=True) for key in ("layout", "partition")}
    record = {"data": {"split": split, **place}, "given": given, "tracker": dict(settings)}
    return json.loads(json.dumps(record))


def earlier_run(restart: str | None, record: Mapping[str, Any]) -> Path | None:
    """Return the run folder `mode.restart`, None where it is not set.

    Raises:
        UserError: it is none of this kind, or its masks depend on other settings.
    """
    if restart is None:
        return None
    folder = Path(restart).expanduser()
    try:
        before = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(
            f"mode.restart={restart} holds no readable {RECORD}: it is no run folder of mode=eval on videos. Give "
            "that of the evaluation to go on with, or leave mode.restart out."
        ) from None
    others = [key for key, value in record.items() if not isinstance(before, dict) or before.get(key) != value]
    if others:
        raise UserError(
            f"mode.restart={restart}: its masks were made with other settings than these ({listed(others)} in its "
            f"{RECORD}). Give the same ones, or leave mode.restart out."
        )
    return folder


def take_over(old: Path, new: Path, files: Collection[str]) -> bool:
    """Copy a folder whole if it holds just these files; return whether it does."""
    if not old.is_dir() or {path.name for path in old.iterdir()} != set(files):
        return False
    with whole_folder(new) as part:
        shutil.copytree(old, part, dirs_exist_ok=True)
    return True
