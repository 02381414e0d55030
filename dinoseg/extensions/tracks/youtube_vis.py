"""Tracks in the JSON format of YouTube-VIS: a file of annotations, and results with a mask or null for each frame."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from dinoseg.core.objects import Objects, RunLengths
from dinoseg.extensions.annotations.entry import size_of
from dinoseg.extensions.objects.scoring.coco_files import check_unique, read_coco_json
from dinoseg.extensions.objects.scoring.coco_instances import Named, finite_number, read_mask, read_together
from dinoseg.extensions.protocols.contract import BadFile, Cases
from dinoseg.extensions.tracks.video import TrackCase, Tracks, VideoTracks, join_frames
from dinoseg.utils import forms
from dinoseg.utils.errors import UserError
from dinoseg.utils.wording import format_value, join_names

_TRACK = {"video_id": forms.integer, "category_id": forms.integer, "segmentations": forms.list_of(forms.plain)}
_VIDEO = forms.object_with(
    id=forms.integer, height=forms.plain, width=forms.plain, file_names=forms.list_of(forms.text)
)
_REFERENCE = forms.object_with(
    videos=forms.list_of(_VIDEO),
    categories=forms.list_of(forms.object_with(id=forms.integer, name=forms.text)),
    annotations=forms.list_of(forms.object_with(id=forms.integer, **_TRACK)),
)
_WHAT = "YouTube-VIS results: a list of tracks with a score"
_RESULTS = forms.list_of(forms.object_with(score=forms.plain, **_TRACK))


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

    def read(self, places: Mapping[int, int]) -> VideoTracks:
        """Return the tracks of the video, see `TrackCase`."""
        ((reference, prediction),) = self.files
        assert prediction is not None
        try:
            size = size_of(self.video["height"], self.video["width"])
        except ValueError as error:
            raise BadFile(reference, f"video {self.video['id']}: {error}") from None
        held, objects = self._read(self.reference, reference, places, size, is_result=False)
        found, results = self._read(self.prediction, prediction, places, size, is_result=True)
        return VideoTracks(held, found, scored=(objects, results))

    def _read(
        self, entries: Sequence[Named], path: Path, places: Mapping[int, int], size: tuple[int, int], *, is_result: bool
    ) -> tuple[Tracks, Objects]:
        """Return the masks of the frames, and each track as an object of all frames side by side."""
        length = len(self.video["file_names"])
        rows: list[tuple[int, int, int]] = []
        masks: list[RunLengths] = []
        tracks, areas, scores, crowds = [], [], [], []
        for number, (name, entry) in enumerate(entries):
            try:
                if entry["category_id"] not in places:
                    raise ValueError(f"its category_id is {entry['category_id']}, unknown to the reference")
                if len(entry["segmentations"]) != length:
                    raise ValueError(
                        f"it has {len(entry['segmentations'])} segmentations, and its video {length} frames: give null "
                        "for frames without a mask"
                    )
                frames = [frame for frame, mask in enumerate(entry["segmentations"]) if mask]
                segmentations = [entry["segmentations"][frame] for frame in frames]
                own = read_together(segmentations, size) or [read_mask(each, size) for each in segmentations]
                scores.append(finite_number(entry["score"], "score") if is_result else 1)
                crowds.append(not is_result and forms.read_flag(entry, "iscrowd"))
                given = None if is_result else entry.get("areas")
                sizes = [mask.area for mask in own] if given is None else [finite_number(a, "area") for a in given if a]
            except ValueError as error:
                raise BadFile(path, f"{name}: {error}") from None
            # as in the official code, frames without pixels do not count
            areas.append(np.mean([area for area in sizes if area] or [0]))
            tracks.append(join_frames(own, frames, size))
            rows += [(frame, number, places[entry["category_id"]]) for frame in frames]
            masks += own
        classes = [places[entry["category_id"]] for _, entry in entries]
        whole = (size[0], size[1] * length)
        return Tracks.of_rows(rows, masks), Objects(
            whole,
            tracks,
            np.array(classes, np.int64),
            np.array(scores, np.float64),
            np.array(areas, np.float64),
            np.array(crowds, bool),
        )


def find_youtube_vis(reference: Path, prediction: Path) -> tuple[dict[int, str], Cases]:
    """Return the categories, and a case for each video of the reference.

    Args:
        reference: file of annotations.
        prediction: file of results, or a folder of such files, whose lists are joined.

    Raises:
        UserError: a file is not of its form, or an id occurs twice.
    """
    whole = read_coco_json(reference, "reference", _REFERENCE, "YouTube-VIS annotations")
    for what in ("videos", "categories", "annotations"):
        check_unique((entry["id"] for entry in whole[what]), reference, what)
    files = sorted(prediction.glob("*.json")) if prediction.is_dir() else [prediction]
    if not files:
        raise UserError(
            f"prediction={prediction} has no JSON file. Give a file of YouTube-VIS results, or their folder."
        )
    videos = {video["id"]: video for video in sorted(whole["videos"], key=lambda one: one["id"])}
    listing = Cases([])
    held = [(reference, entry) for entry in whole["annotations"]]
    found = [(file, entry) for file in files for entry in read_coco_json(file, "prediction", _RESULTS, _WHAT)]
    sides: list[dict[int, list[Named]]] = []
    for kind, entries in (("annotation", held), ("result", found)):
        by_video: dict[int, list[Named]] = {number: [] for number in videos}
        for position, (file, entry) in enumerate(entries):
            name = f"video {entry['video_id']}, {kind} {format_value(entry.get('id', position))}"
            if entry["video_id"] in videos:
                by_video[entry["video_id"]].append((name, entry))
            else:
                listing.problems.append((file, f"{name}: the video is not in {reference}"))
        sides.append(by_video)
    empty = [str(number) for number in videos if not sides[1][number]]
    if empty:
        listing.notes.append(f"{prediction} has no track of the videos {join_names(empty)}: their objects are missed.")
    names = _name_videos(videos)
    for number, video in videos.items():
        entries_of_video = (side[number] for side in sides)
        listing.cases.append(
            YoutubeVisCase(names[number], names[number], ((reference, prediction),), video, *entries_of_video)
        )
    return {entry["id"]: entry["name"] for entry in sorted(whole["categories"], key=lambda one: one["id"])}, listing


def _name_videos(videos: Mapping[int, Mapping[str, Any]]) -> dict[int, str]:
    """Return the folder of each video's frames, or its id if that is not unique."""
    names = {number: PurePosixPath(*video["file_names"][:1]).parent.name for number, video in videos.items()}
    return names if len({*names.values()} - {""}) == len(names) else {number: str(number) for number in names}
