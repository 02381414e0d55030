"""Tracks of videos in files of MOTS and YouTube-VIS; no torch.

MOTS: a text file for each video, and a line `frame id class height width counts` for each mask, with COCO's compressed
run lengths. Masks of a frame do not overlap. YouTube-VIS: a JSON file of annotations and one of results, each a track
with a mask or null for each frame.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from dinoseg.core.objects import Objects, RunLengths
from dinoseg.extensions.annotations.entry import size_of
from dinoseg.extensions.objects.overlaps import overlaps
from dinoseg.extensions.objects.scoring.coco_files import Named, check_unique, group_entries, read_coco_json
from dinoseg.extensions.objects.scoring.coco_instances import read_objects
from dinoseg.extensions.protocols.contract import BadFile, Cases, ScoringCase
from dinoseg.utils import forms
from dinoseg.utils.errors import UserError
from dinoseg.utils.wording import format_text

_IGNORED = 0.5 + np.finfo(float).eps  # share of a mask in ignored regions, above which it does not count
_LIMIT = 2**31  # of frames and ids, whose products with pixels are numbers of 64 bits
_LIST = forms.list_of(forms.plain)
_TRACK: dict[str, forms.Form] = {"video_id": forms.integer, "category_id": forms.integer, "segmentations": _LIST}
_VIDEO = forms.object_with(
    id=forms.integer, height=forms.plain, width=forms.plain, file_names=forms.list_of(forms.text)
)
_REFERENCE = forms.object_with(
    videos=forms.list_of(_VIDEO),
    categories=forms.list_of(forms.object_with(id=forms.integer, name=forms.text)),
    annotations=forms.list_of(forms.object_with(id=forms.integer, areas=_LIST, **_TRACK)),
)
_RESULTS = forms.list_of(forms.object_with(score=forms.plain, **_TRACK))
Lines = tuple[list[tuple[int, int]], list[Named]]  # frame and id of each mask, and its entry as in COCO's results


@dataclass(frozen=True)
class Tracks:
    """Masks of one side of a video.

    Args:
        frames: (N,) int64, frame of each mask.
        ids: (N,) int64, of the track.
        objects: masks and classes of the N masks.
    """

    frames: np.ndarray
    ids: np.ndarray
    objects: Objects

    def select(self, places: Sequence[int] | np.ndarray) -> "Tracks":
        """Return the masks at some places, in their order."""
        return Tracks(self.frames[places], self.ids[places], self.objects.select(places))

    def place(self) -> list[RunLengths]:
        """Return the masks in an image in which all frames lie side by side."""
        offsets = (self.frames * prod(self.objects.size)).tolist()
        masks = zip(self.objects.masks, offsets, strict=True)
        return [RunLengths(mask.starts + offset, mask.ends + offset) for mask, offset in masks]


@dataclass(frozen=True)
class VideoTracks:
    """Both sides of a video.

    Args:
        reference: annotated tracks.
        prediction: predicted tracks.
        is_ignored: (N,) bool, whether a predicted mask lies in an ignored region, and does not count without a match.
        scored: annotated and predicted tracks as objects of one image; None: predictions have no scores.
    """

    reference: Tracks
    prediction: Tracks
    is_ignored: np.ndarray
    scored: tuple[Objects, Objects] | None = None


class TrackCase(ScoringCase, ABC):
    """Base class of the files of a video, of one format."""

    @abstractmethod
    def read(self, categories: Collection[int]) -> VideoTracks:
        """Return the tracks of the video, given the ids of the classes in their order.

        Raises:
            BadFile: a file is invalid.
        """


@dataclass(frozen=True)
class MotsCase(TrackCase):
    """Text files of a video.

    Args:
        ignore_id: class of ignored regions in the reference; None: it has none.
    """

    ignore_id: int | None = None

    def read(self, categories: Collection[int]) -> VideoTracks:
        """Return the tracks of the video, see `TrackCase`."""
        ((reference, prediction),) = self.files
        assert prediction is not None
        sides = _read_lines(reference), _read_lines(prediction)
        size = next((entry["segmentation"]["size"] for _, entries in sides for _, entry in entries), (1, 1))
        known = [*categories] if self.ignore_id is None else [*categories, self.ignore_id]
        everything = _read_tracks(reference, sides[0], known, size)
        is_region = everything.objects.classes == len(categories)
        held = everything.select(np.flatnonzero(~is_region))
        found = _read_tracks(prediction, sides[1], categories, size)
        _check_tracks(reference, held)
        _check_tracks(prediction, found)
        region = RunLengths.union(everything.select(np.flatnonzero(is_region)).place())
        inside = overlaps(found.place(), [region])[:, 0] / np.maximum(found.objects.areas, 1)
        return VideoTracks(held, found, inside > _IGNORED)


def find_mots(
    reference: Path, prediction: Path, categories: Mapping[int, str] | None, ignore_id: int | None
) -> tuple[dict[int, str], Cases]:
    """Return the categories, by default the class ids of the reference, and a case for each text file of it.

    Raises:
        UserError: a folder has no text file, or one of the reference cannot be read.
    """
    held, found = ({path.stem: path for path in sorted(folder.glob("*.txt"))} for folder in (reference, prediction))
    if not (held and found):
        raise UserError(
            f"{prediction if held else reference} has no file NAME.txt of MOTS. Give the folder that has one for each "
            "video, such as RUN/mots of mode=track, or reference=FILE.json of YouTube-VIS."
        )
    if categories is None:
        ids = {entry["category_id"] for path in held.values() for _, entry in _read_lines(path)[1]}
        categories = {number: str(number) for number in sorted(ids - {ignore_id})}
    cases = [MotsCase(name, name, ((path, found[name]),), ignore_id) for name, path in held.items() if name in found]
    reason = "is missing; the file of a video without tracks is empty"
    problems = [(prediction / path.name, reason) for name, path in held.items() if name not in found]
    notes = [f"{path}: the video has no reference." for name, path in found.items() if name not in held]
    return {**categories}, Cases([*cases], problems, notes)


def _read_lines(path: Path) -> Lines:
    rows: list[tuple[int, int]] = []
    entries: list[Named] = []
    try:
        lines = forms.read_regular(path).decode("ascii").splitlines()
    except UnicodeDecodeError as error:
        raise BadFile(path, f"a file of MOTS is ASCII text ({error})") from None
    for number, line in enumerate(lines, 1):
        try:
            *values, counts = line.split()
            frame, track, category, *size = map(int, values)
            if not all(0 <= number < _LIMIT for number in (frame, track)):
                raise ValueError
            mask = {"size": [*size_of(*size)], "counts": counts}
        except (TypeError, ValueError):
            reason = "give frame and id (from 0), class, height and width in pixels, and run lengths"
            raise BadFile(path, f"line {number} is {format_text(line, 60)}: {reason}") from None
        rows.append((frame, track))
        entries.append((f"line {number}", {"category_id": category, "score": 1, "segmentation": mask}))
    return rows, entries


def _read_tracks(path: Path, lines: Lines, categories: Collection[int], size: Sequence[int]) -> Tracks:
    rows, entries = lines
    remedy = "Name all classes, such as 'protocol.categories={1: car, 2: pedestrian}'"
    objects = read_objects(entries, path, (size[0], size[1]), categories, is_result=True, remedy=remedy)
    frames, ids = np.array(rows, np.int64).reshape(-1, 2).T
    return Tracks(frames, ids, objects)


def _check_tracks(path: Path, tracks: Tracks) -> None:
    """Refuse an id that occurs twice in a frame, and masks that overlap."""
    pairs, numbers = np.unique(np.stack([tracks.frames, tracks.ids]), axis=1, return_counts=True)
    if numbers.max(initial=1) > 1:
        frame, track = pairs[:, numbers.argmax()].tolist()
        raise BadFile(path, f"the id {track} occurs twice in frame {frame}: give each track one mask")
    starts, ends = np.concatenate([np.zeros((2, 0), np.int64), *map(np.stack, tracks.place())], axis=1)
    order = np.argsort(starts, kind="stable")
    order = order[ends[order] > starts[order]]
    overlapping = starts[order[1:]][ends[order[:-1]] > starts[order[1:]]]
    if overlapping.size:
        frame = int(overlapping[0]) // prod(tracks.objects.size)
        raise BadFile(path, f"masks of frame {frame} overlap: give each pixel to one track")


@dataclass(frozen=True)
class YoutubeVisCase(TrackCase):
    """Tracks of a video.

    Args:
        video: its entry.
        reference: its annotations.
        prediction: its results.
    """

    video: Mapping[str, Any]
    reference: Sequence[Named]
    prediction: Sequence[Named]

    def read(self, categories: Collection[int]) -> VideoTracks:
        """Return the tracks of the video, see `TrackCase`."""
        ((reference, prediction),) = self.files
        assert prediction is not None
        held, objects = self._read(self.reference, reference, categories, is_result=False)
        found, results = self._read(self.prediction, prediction, categories, is_result=True)
        return VideoTracks(held, found, np.zeros(len(found.frames), bool), (objects, results))

    def _read(
        self, entries: Sequence[Named], path: Path, categories: Collection[int], *, is_result: bool
    ) -> tuple[Tracks, Objects]:
        """Return the masks of the frames, and each track as an object of all frames side by side."""
        try:
            height, width = size_of(self.video["height"], self.video["width"])
        except ValueError as error:
            raise BadFile(self.files[0][0], f"video {self.video['id']}: {error}") from None
        length = len(self.video["file_names"])
        rows: list[tuple[int, int]] = []
        masks: list[Named] = []
        for number, (name, entry) in enumerate(entries):
            areas = entry["segmentations"] if is_result else entry["areas"]
            if not len(entry["segmentations"]) == len(areas) == length:
                raise BadFile(
                    path,
                    f"{name} has {len(entry['segmentations'])} segmentations and {len(areas)} areas, and its video "
                    f"{length} frames: give null for frames without a mask",
                )
            # a track without a mask is an object, too: it gets an empty one in no frame
            for frame in [place for place, mask in enumerate(entry["segmentations"]) if mask] or [-1]:
                empty = {"size": [height, width], "counts": [height * width]}
                mask = {
                    "segmentation": empty if frame < 0 else entry["segmentations"][frame],
                    "area": 0 if frame < 0 else areas[frame] or 0,
                }
                rows.append((frame, number))
                masks.append((f"{name}, frame {frame}", {**entry, **mask}))
        remedy = "If dinoseg wrote the file, track with mode.ids=REFERENCE"
        objects = read_objects(masks, path, (height, width), categories, is_result=is_result, remedy=remedy)
        frames, ids = np.array(rows, np.int64).reshape(-1, 2).T
        tracks = Tracks(frames, ids, objects)
        starts = np.flatnonzero(np.diff(ids, prepend=-1))
        groups = np.split(np.arange(len(rows)), starts)[1:]
        scored = replace(
            objects.select(starts),
            size=(height, width * length),
            masks=[RunLengths.union(tracks.select(group).place()) for group in groups],
            # as in the official code, frames without pixels do not count
            areas=np.array([np.mean([area for area in objects.areas[group] if area] or [0]) for group in groups]),
        )
        return tracks.select(np.flatnonzero(frames >= 0)), scored


def find_youtube_vis(reference: Path, prediction: Path) -> tuple[dict[int, str], Cases]:
    """Return the categories, and a case for each video of the reference.

    Args:
        reference: file of annotations.
        prediction: file of results, or a folder of such files, whose lists are joined.

    Raises:
        UserError: a file is not of its form, or an id occurs twice.
    """
    whole = read_coco_json(reference, "reference", _REFERENCE, "YouTube-VIS annotations")
    for kind in ("videos", "categories", "annotations"):
        check_unique((entry["id"] for entry in whole[kind]), reference, kind)
    files = sorted(prediction.glob("*.json")) if prediction.is_dir() else [prediction]
    if not files:
        raise UserError(f"prediction={prediction} has no JSON file. Give the results of YouTube-VIS, or their folder.")
    what = "YouTube-VIS results: a list of tracks with scores"
    results = [(path, entry) for path in files for entry in read_coco_json(path, "prediction", _RESULTS, what)]
    annotations = [(reference, entry) for entry in whole["annotations"]]
    videos = {video["id"]: video for video in sorted(whole["videos"], key=lambda one: one["id"])}
    held, _ = group_entries(annotations, "annotation", "video", videos, reference)
    found, problems = group_entries(results, "result", "video", videos, reference)
    names = {number: PurePosixPath(*video["file_names"][:1]).parent.name for number, video in videos.items()}
    if len({*names.values()} - {""}) < len(names):
        names = {number: str(number) for number in videos}
    notes = [
        f"{prediction} has no track of {name}: all objects of this video are missed."
        for number, name in names.items()
        if not found[number]
    ]
    cases = [
        YoutubeVisCase(names[number], names[number], ((reference, prediction),), video, held[number], found[number])
        for number, video in videos.items()
    ]
    categories = {entry["id"]: entry["name"] for entry in sorted(whole["categories"], key=lambda one: one["id"])}
    return categories, Cases([*cases], problems, notes)
