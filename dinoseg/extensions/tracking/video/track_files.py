"""Tracks of a video in the formats of MOTS and YouTube-VIS, written frame by frame in constant memory."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dinoseg.core.objects import RunLengths
from dinoseg.data.classes.labels import Labels
from dinoseg.extensions.annotations import rle
from dinoseg.extensions.annotations.coco_ids import CocoIds
from dinoseg.extensions.clips.videos import VOID
from dinoseg.extensions.tracking.tracker import TrackedObject
from dinoseg.utils.atomic import atomic_file, scratch_folder

TrackFormat = Literal["mots", "youtube_vis"]
WriteFrame = Callable[[int, np.ndarray], None]  # takes the position of a frame and its mask (H, W) of IDs
_Rows = Mapping[int, tuple[int, float, Mapping[str, Any]]]  # category, score and run lengths of each ID
_WriteRows = Callable[[int, _Rows], None]  # takes the position of a frame
_IDS_OF_CLASS = 1000  # in MOTS, the id of a track is class * 1000 + number
_UNKNOWN = (1, 1.0)  # category and score of objects that have none


@dataclass(frozen=True)
class TrackFiles:
    """Files to write of the tracks of a video.

    Args:
        formats: of the files.
        name: of the video, and of its files.
        ids: of the video and of the classes.
    """

    formats: Sequence[TrackFormat] = ()
    name: str = ""
    ids: CocoIds = CocoIds(Labels((), (), VOID), {})

    @contextmanager
    def open(self, folder: Path, tracked: Mapping[int, TrackedObject] | None) -> Iterator[WriteFrame]:
        """Yield a function that writes the next frame to FORMAT/NAME below a folder.

        Args:
            folder: the run folder.
            tracked: class and score of each ID; None: IDs have none.

        Raises:
            UserError: the ids lack the video or a class.
        """
        known = {
            number: (self.ids.find_category(found.class_id), found.score)
            for number, found in (tracked or {}).items()
            if self.formats
        }
        known_video = self.ids.find_image(self.name)
        video = 1 if known_video is None else known_video
        with ExitStack() as stack:
            writers = [stack.enter_context(_WRITERS[name](folder / name / self.name, video)) for name in self.formats]

            def write(position: int, mask: np.ndarray) -> None:
                rows = {}
                for number, runs in RunLengths.of_ids(mask).items():
                    counts = {"size": [*mask.shape], "counts": rle.to_text(runs.to_counts(mask.size))}
                    rows[number] = (*known.get(number, _UNKNOWN), counts)
                for write_rows in writers:
                    write_rows(position, rows)

            yield write


@contextmanager
def _write_mots(path: Path, video: int) -> Iterator[_WriteRows]:
    with atomic_file(path.with_name(f"{path.name}.txt")) as part, open(part, "w", encoding="ascii") as file:

        def write(position: int, rows: _Rows) -> None:
            for number, (category, _, mask) in rows.items():
                print(position, category * _IDS_OF_CLASS + number, category, *mask["size"], mask["counts"], file=file)

        yield write


@contextmanager
def _write_youtube_vis(path: Path, video: int) -> Iterator[_WriteRows]:
    tracks: dict[int, dict[str, Any]] = {}
    lengths: dict[int, int] = {}
    # a file for each track: the format lists the frames of one track after another
    with scratch_folder(path.parent, path.name) as parts:

        def write(position: int, rows: _Rows) -> None:
            for number, (category, score, mask) in rows.items():
                tracks[number] = {"video_id": video, "category_id": category, "score": score, "segmentations": []}
                with open(parts / str(number), "a", encoding="ascii") as part:
                    gap = "null," * (position - lengths.get(number, 0))
                    part.write("," * (number in lengths) + gap + json.dumps(mask))
                lengths[number] = position + 1
            lengths[0] = position + 1  # of the video

        yield write
        with atomic_file(path.with_name(f"{path.name}.json")) as whole, open(whole, "w", encoding="ascii") as file:
            file.write("[")
            for number in sorted(tracks):
                file.write(",\n" * (file.tell() > 1) + json.dumps(tracks[number]).removesuffix("]}"))
                with open(parts / str(number), encoding="ascii") as part:
                    shutil.copyfileobj(part, file)
                file.write(",null" * (lengths[0] - lengths[number]) + "]}")
            file.write("]\n")


_WRITERS = {"mots": _write_mots, "youtube_vis": _write_youtube_vis}
