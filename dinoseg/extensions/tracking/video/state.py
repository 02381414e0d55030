"""Saved state of an unfinished tracking run: progress, tracker settings and tracker state."""

import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from dinoseg.utils import forms
from dinoseg.utils.atomic import sync_to_disk
from dinoseg.utils.errors import UserError
from dinoseg.utils.tensor_files import check_openable, write_tensors
from dinoseg.utils.wording import count_of, join_names

logger = logging.getLogger(__name__)
MASKS, STATE, RESULT = "masks", "state.safetensors", "track.json"
_FORMAT = 1
_PROGRESS_FORM = forms.record(done=forms.whole(), frames=forms.text, labels=forms.text, batch_size=forms.whole(1))
_FORM = forms.record(format=forms.whole(1), progress=_PROGRESS_FORM, settings=forms.table(forms.plain))


@dataclass(frozen=True)
class TrackProgress:
    """Progress of a run: frames done, batch size, and digests of the frames (names and pixels) and the given masks."""

    done: int
    frames: str
    labels: str
    batch_size: int


@dataclass(frozen=True)
class TrackState:
    """Saved state of an unfinished run."""

    progress: TrackProgress
    settings: Mapping[str, Any]  # of its tracker
    tensors: dict[str, Tensor]  # state of its tracker


def save_track_state(folder: Path, state: TrackState, masks: Sequence[Path] = ()) -> None:
    """Save a run's state to its folder atomically.

    Args:
        folder: the run folder.
        state: of the tracker; frames that it counts as done are never tracked again.
        masks: files written since the last save; flushed to disk first, so that a power failure cannot lose them.

    Raises:
        UserError: the state cannot be written; the previous state is unchanged.
        OSError: a mask cannot be flushed.
    """
    # before the state that counts them as done: a resumed run does not write them again
    _flush(masks)
    info = {"format": _FORMAT, "progress": asdict(state.progress), "settings": state.settings}
    write_tensors(folder / STATE, state.tensors, {"track": json.dumps(info)})


def check_unfinished(folder: Path) -> None:
    """Check that a folder contains an unfinished run.

    Raises:
        UserError: the run is finished, or there is none.
    """
    if (folder / RESULT).is_file():
        raise UserError(
            f"mode.restart={folder}: that run is finished; its masks are in {folder / MASKS}. To track again, leave "
            "mode.restart out."
        )
    if not (folder / STATE).is_file():
        raise UserError(
            f"mode.restart={folder}: not an unfinished run of mode=track (no {STATE}). Give the run folder, or leave "
            "mode.restart out to start over."
        )


def read_track_state(folder: Path) -> TrackState:
    """Read the saved state of the run in a folder, without unpickling.

    Raises:
        UserError: there is no unfinished run, or its file cannot be read.
    """
    check_unfinished(folder)
    path = folder / STATE
    try:
        check_openable(path)
        with safe_open(path, framework="pt") as file:
            info = forms.parse_json((file.metadata() or {}).get("track", "{}"), forms.table(forms.plain))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        if type(info.get("format")) is int and info["format"] > _FORMAT:
            raise UserError(f"{path} was written by a newer dinoseg. Update dinoseg, or start over.")
        _FORM(info, "its description")
        return TrackState(TrackProgress(**info["progress"]), info["settings"], tensors)
    except (SafetensorError, OSError, forms.SchemaError) as error:
        raise UserError(f"{path} is not readable ({error}). Leave mode.restart out to start over.") from error


def check_batch_size(folder: Path, then: int, now: int) -> None:
    """Warn if the batch size differs from that of the run to resume, since other batches round differently."""
    if then != now:
        logger.warning(
            "mode.restart=%s: mode.batch_size was %d and is %d. Masks may differ by rounding from those of an "
            "uninterrupted run; with mode.batch_size=%d they are identical.",
            folder,
            then,
            now,
            then,
        )


def check_masks(folder: Path, names: Iterable[str]) -> None:
    """Check that the masks of all frames that are done exist; a resumed run would not write them again.

    Raises:
        UserError: masks are missing or empty; the message names them.
    """
    files = [folder / MASKS / f"{name}.png" for name in names]
    lost = [path.name for path in files if not (path.is_file() and path.stat().st_size)]
    if lost:
        raise UserError(
            f"mode.restart={folder}: {count_of(lost, 'mask')} of the {len(files)} finished frames missing or empty in "
            f"{folder / MASKS}: {join_names(lost)}. Restore them, or start over without mode.restart."
        )


def _flush(files: Sequence[Path]) -> None:
    for path in files:
        sync_to_disk(path)
    for parent in {path.parent for path in files}:
        with suppress(OSError):  # Windows and some network file systems cannot flush folders
            _sync_folder(parent)


def _sync_folder(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
