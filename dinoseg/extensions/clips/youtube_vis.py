"""Reader of YouTube-VIS: {train,valid}/JPEGImages/<video>/<frame>.jpg, and annotations of objects in one JSON file."""

import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from dinoseg.extensions.annotations import rle
from dinoseg.extensions.annotations.drawing import CompressedColumns, Drawing, Form
from dinoseg.extensions.annotations.entry import polygons, size_of
from dinoseg.extensions.clips.videos import VOID, FrameFiles, Video
from dinoseg.utils import forms
from dinoseg.utils.errors import UserError
from dinoseg.utils.files import Stamp, is_name, stamp
from dinoseg.utils.ranges import Count
from dinoseg.utils.wording import count_of, format_text, format_value, has_surrogates, join_names

FRAMES_PER_SECOND = 6  # every fifth frame of 30 per second
_FORM = forms.object_with(videos=forms.list_of(forms.plain))


class _Listed(NamedTuple):
    """Video of the annotation file."""

    folder: str
    files: list[str]  # frame files in the folder
    size: tuple[int, int]
    objects: list[list[Form | None]]  # by object, then by frame; None: not visible


@dataclass(frozen=True)
class YoutubeVis:
    """Locations of the YouTube-VIS videos, with all objects as instance ids, without their categories.

    The public annotations are those of `train`. As in SlotContrast (martius-lab/slotcontrast, data/save_ytvis2021.py),
    its last videos, in the order of the file, are the split val; the others are train. The split test has no masks.
    With another folder for val, both splits are whole folders.

    Object k of a video is its k-th annotation in the file, without crowds. Where objects overlap, the later one covers
    the earlier ones.

    Args:
        root: folder with the folders of `splits`.
        held_out: number of videos at the end of the file that are val.
        splits: split to its folder.
    """

    root: str
    held_out: Count = 300
    splits: Mapping[str, str] = field(default_factory=lambda: {"test": "valid"})
    split_local_names: ClassVar[bool] = False

    def videos(self, split: str) -> list[Video]:
        """Return the videos of a split, in the order of the file; masks are decoded when they are read.

        Raises:
            UserError: a file or folder is missing, the annotations are invalid, or no video is left for train.
        """
        root, folder = Path(self.root).expanduser(), self._folder(split)
        path = _annotation_file(root, folder)
        listed = _read(path, stamp(path))
        has_masks = any(video.objects for video in listed)
        if split in ("train", "val") and self._folder("train") == self._folder("val"):
            if len(listed) <= self.held_out:
                raise UserError(
                    f"{path} lists {count_of(listed, 'video')}, and data.held_out={self.held_out} of them are val: "
                    "none is left for train. Lower data.held_out."
                )
            listed = listed[-self.held_out :] if split == "val" else listed[: -self.held_out]
        return [_video(root / folder / "JPEGImages", path, video, has_masks) for video in listed]

    def _folder(self, split: str) -> str:
        return self.splits.get(split, "train" if split == "val" else split)


def _annotation_file(root: Path, folder: str) -> Path:
    places = [root / folder / "instances.json", root / f"{folder}.json", root / f"instances_{folder}.json"]
    for path in places:
        if path.is_file():
            return path
    raise UserError(
        f"No annotations in {root}: {join_names([str(path.relative_to(root)) for path in places])} do not exist. Check "
        "data.root and data.splits."
    )


def _video(images: Path, path: Path, listed: _Listed, has_masks: bool) -> Video:
    """Return a video; if the file has annotations, one without objects has empty masks.

    Of its frames, only the first one's size is compared with the file: a header for each video, no pixels.
    """
    folder = images / listed.folder
    try:
        present = set(os.listdir(folder))
    except (OSError, ValueError):  # ValueError: a name that no folder can have
        raise UserError(
            f"No folder {format_text(str(folder), 200)}, which {path} lists. Unpack the data set again."
        ) from None
    if absent := [name for name in listed.files if name not in present]:
        raise UserError(
            f"{folder} lacks {count_of(absent, 'frame')} that {path} lists: {join_names(absent)}. Unpack the data set "
            "again."
        )
    masks: dict[int, Path | Drawing] = {}
    if has_masks:
        for position, file in enumerate(listed.files):
            by_object = enumerate((forms[position] for forms in listed.objects), start=1)
            shapes = [(number, form) for number, form in by_object if form is not None]
            masks[position] = Drawing(path, f"{listed.folder}/{file}", listed.size, 0, shapes)
    video = Video(listed.folder, FrameFiles(folder, listed.files), FRAMES_PER_SECOND, masks)
    if masks:
        video.check_size(0)
    return video


@functools.lru_cache(maxsize=2)
def _read(path: Path, _stamp: Stamp | None) -> list[_Listed]:
    """Return the videos of an annotation file in its order; `_stamp` renews the cache when the file changes."""
    try:
        whole = forms.read_json(path, _FORM)
        return _parse(whole)
    except (OSError, ValueError) as error:
        raise UserError(
            f"Cannot read {path} as annotations of YouTube-VIS ({error}). Correct it, or unpack the data set again."
        ) from None


def _parse(whole: Mapping[str, Any]) -> list[_Listed]:
    videos: dict[int, _Listed] = {}
    for position, entry in enumerate(whole["videos"]):
        where = f"videos[{position}]"
        if not isinstance(entry, dict) or type(entry.get("id")) is not int:
            given = format_value(entry.get("id") if isinstance(entry, dict) else entry, 40)
            raise ValueError(f"{where} has no whole number as id: {given}")
        if entry["id"] in videos:
            raise ValueError(f"{where} has the id {entry['id']} of another video: make ids unique")
        folder, files = _file_names(entry.get("file_names"), where)
        try:
            size = size_of(entry.get("height"), entry.get("width"))
        except ValueError as error:
            raise ValueError(f"{where} (id {entry['id']}): {error}") from None
        videos[entry["id"]] = _Listed(folder, files, size, [])
    folders = [video.folder for video in videos.values()]
    if len({*folders}) < len(folders):
        raise ValueError("two videos have one folder of frames")
    annotations = whole.get("annotations")
    annotations = [] if annotations is None else annotations  # `valid` has none
    if not isinstance(annotations, list):
        raise ValueError("annotations is not a list")
    for position, annotation in enumerate(annotations):
        where = f"annotations[{position}]"
        if not isinstance(annotation, dict):
            raise ValueError(f"{where} is not an object")
        where = f"{where} (id {format_value(annotation.get('id'), 20)})"
        video = annotation.get("video_id")
        if type(video) is not int or video not in videos:
            raise ValueError(f"{where} belongs to video {format_value(video, 40)}, which is not in videos")
        if not forms.read_flag(annotation, "iscrowd", f"{where}: its"):
            videos[video].objects.append(_shapes(annotation.get("segmentations"), videos[video], where))
            if len(videos[video].objects) >= VOID:
                raise ValueError(f"video {videos[video].folder} has more than {VOID - 1} objects")
    return list(videos.values())


def _file_names(names: Any, where: str) -> tuple[str, list[str]]:
    """Return the folder and the files of a video's frames, each given as `<folder>/<file>`."""
    if not isinstance(names, list) or not names:
        raise ValueError(f"{where} has no file_names")
    parts = [tuple(name.split("/")) if isinstance(name, str) else () for name in names]
    for name, part in zip(names, parts, strict=True):
        if len(part) != 2 or not all(map(is_name, part)) or has_surrogates(name):
            raise ValueError(f"{where} has the file name {format_value(name, 60)}: give <video>/<frame>.jpg")
    if len({folder for folder, _ in parts}) > 1 or len({Path(file).stem for _, file in parts}) < len(parts):
        raise ValueError(f"{where} has frames in several folders, or two frames with one name")
    return parts[0][0], [file for _, file in parts]


def _shapes(segmentations: Any, video: _Listed, where: str) -> list[Form | None]:
    """Return the form of an object in each frame, or None where it is not visible."""
    if not isinstance(segmentations, list):
        raise ValueError(
            f"{where} has the segmentations {format_value(segmentations, 40)}: give a list with run lengths, polygons "
            f"or null for each of the {count_of(video.files, 'frame')} of video {video.folder}"
        )
    if len(segmentations) != len(video.files):
        raise ValueError(
            f"{where} has {count_of(segmentations, 'segmentation')}, its video {video.folder} "
            f"{count_of(video.files, 'frame')}: give one for each frame, or null"
        )
    shapes: list[Form | None] = []
    for frame, segmentation in enumerate(segmentations):
        try:
            shapes.append(_form(segmentation, video.size))
        except ValueError as error:
            raise ValueError(f"{where}, frame {frame} of video {video.folder}: {error}") from None
    return shapes


def _form(segmentation: Any, size: tuple[int, int]) -> Form | None:
    if segmentation is None:
        return None
    if isinstance(segmentation, list) and segmentation:
        return polygons(segmentation)
    if not isinstance(segmentation, dict):
        raise ValueError(f"its segmentation is {format_value(segmentation, 40)}: give run lengths, polygons or null")
    return CompressedColumns(rle.to_text(rle.parse_mask(segmentation, size)))
