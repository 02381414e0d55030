"""Reader of YouTube-VOS in its original layout: {train,valid,test}/JPEGImages, Annotations and meta.json."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from dinoseg.extensions.clips.videos import FrameFiles, Video, frames_and_masks, video_folders
from dinoseg.utils import forms
from dinoseg.utils.errors import UserError
from dinoseg.utils.files import natural_order
from dinoseg.utils.wording import count_of, join_names

ANNOTATED_RATE, VIDEO_RATE = 6, 30  # frames per second: every fifth is annotated
FULLY_ANNOTATED = ("train",)  # in other splits, only frames in which an object first appears have a mask


@dataclass(frozen=True)
class YoutubeVos:
    """Locations of the YouTube-VOS videos.

    Args:
        root: folder with `train`, `valid` and `test`.
        all_frames: use the 30 fps frames of `{split}_all_frames`; every fifth frame may have a mask.
        splits: split to its folder.
    """

    root: str
    all_frames: bool = False
    splits: Mapping[str, str] = field(default_factory=lambda: {"val": "valid"})
    split_local_names: ClassVar[bool] = False

    def videos(self, split: str) -> list[Video]:
        """Return the videos of a split, checked against `meta.json` if it exists.

        Raises:
            UserError: a folder is missing, a mask has no frame, or `meta.json` is damaged or lists other videos.
        """
        root, folder = Path(self.root).expanduser(), self.splits.get(split, split)
        images = root / (f"{folder}_all_frames" if self.all_frames else folder) / "JPEGImages"
        masks = root / folder / "Annotations"
        for required in (images, masks):
            if not required.is_dir():
                contents = sorted(path.name for path in root.glob("[!.]*")) or ["nothing"]
                raise UserError(
                    f"No folder {required} for split {split}; {root} holds {join_names(contents)}. Check data.root, "
                    "data.all_frames and data.splits."
                )
        meta = _read_meta(root / folder / "meta.json")
        names = [path.name for path in video_folders(images)]
        if alien := [name for name in names if meta is not None and name not in meta]:
            raise UserError(
                f"{count_of(alien, 'video')} of {images} not in {root / folder / 'meta.json'}: {join_names(alien)}. "
                "Does it belong to another release?"
            )
        videos = []
        for name in names:
            frames, labels = frames_and_masks(images / name, masks / name)
            if not labels:
                raise UserError(f"Video {name} has no mask in {masks / name}. Unpack the data set again.")
            if meta is not None:
                _check_objects(name, meta[name], frames, labels)
            rate = VIDEO_RATE if self.all_frames else ANNOTATED_RATE
            videos.append(Video(name, frames, rate, labels, dense=folder in FULLY_ANNOTATED))
        return videos


def _read_meta(path: Path) -> Mapping | None:
    """Return video to its metadata, or None if the file does not exist."""
    if not path.is_file():
        return None
    try:
        whole = forms.read_json(path, forms.table(forms.plain))
        forms.table(forms.plain)(whole.get("videos"), "videos")
    except (OSError, forms.SchemaError) as error:
        raise UserError(f"Cannot read {path} as YouTube-VOS's meta.json ({error}). Unpack it again.") from None
    return whole["videos"]


def _check_objects(name: str, known: Mapping, frames: FrameFiles, labels: Mapping[int, Path]) -> None:
    """Raise a UserError if a frame in which an object first appears, by `meta.json`, is missing or has no mask."""
    try:
        first = {min(entry["frames"], key=natural_order) for entry in known["objects"].values()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"meta.json lacks the frames of the objects of video {name}. Unpack it again.") from None
    stems, masked = {Path(file).stem for file in frames.files}, {path.stem for path in labels.values()}
    for there, what in ((stems, "which do not exist"), (masked, "without mask")):
        if absent := sorted(first - there):
            raise UserError(
                f"meta.json has objects that appear in frames of video {name} {what}: {join_names(absent)}. Unpack the "
                "data set again."
            )
