"""Resuming an interrupted evaluation of videos: masks of finished videos are copied from its run folder."""

import hashlib
import logging
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from dinoseg.data.annotation.drawing import Drawing
from dinoseg.data.clips.videos import Video
from dinoseg.experiment.settings import check_same_settings
from dinoseg.utils import forms
from dinoseg.utils.atomic import atomic_folder, write_text
from dinoseg.utils.errors import UserError
from dinoseg.utils.files import check_regular, entries
from dinoseg.utils.stamps import stamp
from dinoseg.utils.units import finished
from dinoseg.utils.wording import count_of, join_names

RECORD = "tracking.json"  # in a run folder: settings that its masks depend on
DIGESTS = "tracked"  # in a run folder: <video>.txt per finished video, a hash of its masks' inputs

logger = logging.getLogger(__name__)
_FORM = forms.record(data=forms.table(forms.plain), given=forms.text, tracker=forms.table(forms.plain))


def earlier_run(restart: str | None, record: Mapping[str, Any]) -> Path | None:
    """Return the run folder `mode.restart`; None if it is not set.

    Raises:
        UserError: the folder is not an evaluation of videos, or its masks depend on other settings.
    """
    if restart is None:
        return None
    folder = Path(restart).expanduser()
    try:
        before = forms.read_json(folder / RECORD, _FORM)
    except (OSError, forms.SchemaError) as error:
        raise UserError(
            f"mode.restart={restart} holds no readable {RECORD} ({error}): it is not a run folder of mode=eval on "
            "videos, or it is damaged. Give the run folder of the evaluation to resume, or leave mode.restart out."
        ) from None
    check_same_settings(folder, _settings_of(before), _settings_of(record))
    return folder


def log_copied(restart: str | None, videos: Sequence[str]) -> None:
    """Log which videos' masks were copied from the run folder `mode.restart`, if it is set."""
    if restart is not None:
        names = f": {join_names(sorted(videos))}" if videos else ""
        logger.info("mode.restart=%s: %s reused%s", restart, count_of(videos, "video"), names)


def digest_of(video: Video, prompts: str) -> str:
    """Return a hash of the inputs of a video's masks: names and files of its frames, and the prompt masks.

    Frames are identified by size, times and inode of their files, so copied files count as changed; masks by content.

    Args:
        video: video of the data set.
        prompts: `none`, `first` or `appearing`, see `dinoseg.evaluation.videos.prompted_frames`.
    """
    digest = hashlib.blake2b(digest_size=16)
    for position, frame in enumerate(video.frames):
        digest.update(f"{video.frame_name(position)} {stamp(frame)}\n".encode(errors="surrogateescape"))
    shown = {"none": [], "first": [0], "appearing": sorted(video.masks)}[prompts]
    for position in shown:
        mask = video.masks.get(position)
        if isinstance(mask, Drawing):
            digest.update(f"{position} {mask.digest()}\n".encode())
        elif mask is not None and mask.is_file():
            digest.update(f"{position} {hashlib.sha256(mask.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def store_digest(out_dir: Path, video: str, digest: str) -> None:
    """Mark a video's masks in a run folder as complete, with the hash of their inputs."""
    write_text(out_dir / DIGESTS / f"{video}.txt", f"{digest}\n")


def take_over(
    earlier: Path | None, out_dir: Path, files: Mapping[Path, Collection[str]], video: str, digest: str
) -> bool:
    """Copy a video's masks from an earlier run if complete and from the same inputs; return whether they were copied.

    Args:
        earlier: run folder of the earlier run; None without one.
        out_dir: run folder of this run.
        files: expected file names in each folder below `out_dir`.
        video: name of the video.
        digest: see `digest_of`; a different stored hash is logged.
    """
    if earlier is None:
        return False
    changed = f"Video {video} is tracked again: its frames or prompt masks differ from those of {earlier}."
    damaged = "%s cannot be read (%s): its video is tracked again."
    note = earlier / DIGESTS / f"{video}.txt"
    if finished(note, _read_digest, lambda noted: noted == digest, damaged=damaged, unfit=changed) is None:
        return False
    sources = {folder: earlier / folder.relative_to(out_dir) for folder in files}
    for folder, source in sources.items():
        if {path.name for path in entries(source) if path.is_file()} != set(files[folder]):
            return False
    for folder, source in sources.items():
        with atomic_folder(folder) as part:
            shutil.copytree(source, part, dirs_exist_ok=True)
    # last, as after tracking: this run may be interrupted and resumed, too
    store_digest(out_dir, video, digest)
    return True


def _settings_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record with the tracker's settings merged into its top level."""
    return {key: value for key, value in record.items() if key != "tracker"} | record["tracker"]


def _read_digest(path: Path) -> str:
    check_regular(path)  # reading a pipe could block forever
    return path.read_text(encoding="utf-8", errors="replace").strip()
