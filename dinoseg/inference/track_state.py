"""Where an unfinished tracking run stands, on disk: what its next frame depends on, and what it was made of."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from dinoseg.errors import UserError
from dinoseg.training.checkpoint import write_tensors

STATE, RESULT = "state.safetensors", "track.json"
_FORMAT = 1


@dataclass(frozen=True)
class Progress:
    """How many frames are done, and hashes of them (names and pixels) and of their masks."""

    done: int
    frames: str
    labels: str


@dataclass(frozen=True)
class Standing:
    """What an unfinished run has kept."""

    progress: Progress
    settings: Mapping[str, Any]  # of its tracker
    tensors: dict[str, Tensor]  # its tracker's state


def save_standing(folder: Path, standing: Standing) -> None:
    """Write where a run stands to its folder, whole or not at all.

    Raises:
        UserError: it cannot be written; what was there stays as it was.
    """
    info = {"format": _FORMAT, "progress": asdict(standing.progress), "settings": standing.settings}
    write_tensors(folder / STATE, standing.tensors, {"track": json.dumps(info)})


def check_unfinished(folder: Path) -> None:
    """Refuse a folder without an unfinished run.

    Raises:
        UserError: the run is finished, or none is there.
    """
    if (folder / RESULT).is_file():
        raise UserError(
            f"mode.restart={folder}: that run is finished, and its masks are in {folder / 'masks'}. To track anew, "
            "leave mode.restart out."
        )
    if not (folder / STATE).is_file():
        raise UserError(
            f"mode.restart={folder}: no unfinished run of mode=track is there (no {STATE}). Give the folder of one, or "
            "leave mode.restart out to begin anew."
        )


def read_standing(folder: Path) -> Standing:
    """Read where the run in a folder stands; nothing in the file is executed.

    Raises:
        UserError: there is no unfinished one, or its file cannot be read.
    """
    check_unfinished(folder)
    path = folder / STATE
    try:
        with safe_open(path, framework="pt") as file:
            info = json.loads((file.metadata() or {})["track"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        if info["format"] > _FORMAT:
            raise UserError(f"{path} was written by a newer dinoseg. Update this one, or begin anew.")
        return Standing(Progress(**info["progress"]), info["settings"], tensors)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not readable ({error}). Leave mode.restart out to begin anew.") from error


def check_same_settings(folder: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to go on with another tracker than a run was begun with.

    Raises:
        UserError: naming each setting that differs.
    """
    before, after = dict(_flat(then)), dict(_flat(json.loads(json.dumps(now))))
    differing = [
        f"{name} was {before.get(name, 'not set')} and is {after.get(name, 'not set')}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]
    if differing:
        raise UserError(
            f"mode.restart={folder}: another tracker than that run's: {'; '.join(differing)}. Give what it had (its "
            f"command line is in {folder / 'config' / 'overrides.txt'}), or begin anew without mode.restart."
        )


def _flat(settings: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value
