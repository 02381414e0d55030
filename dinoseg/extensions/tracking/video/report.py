"""Results of a finished tracking run: overlay video, object table and track.json, from its frames and saved masks."""

import csv
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from dinoseg import __version__
from dinoseg.extensions.tracking.tracker import TrackedObject
from dinoseg.extensions.tracking.video.mask_folder import MaskColours
from dinoseg.extensions.tracking.video.run import TrackJob
from dinoseg.extensions.tracking.video.state import MASKS, RESULT, STATE
from dinoseg.extensions.tracking.video.track_files import TrackFiles
from dinoseg.extensions.video.frames import FrameReader, open_frames
from dinoseg.extensions.video.writer import VideoWriter
from dinoseg.inference.stream import Throughput, run_pipeline
from dinoseg.report.overlay import blend
from dinoseg.utils.atomic import atomic_file, write_json
from dinoseg.utils.csv_text import csv_cells
from dinoseg.utils.errors import UserError
from dinoseg.utils.images import read_ids
from dinoseg.utils.wording import count_of

logger = logging.getLogger(__name__)
_DEPTH = 4  # frames queued before and after the middle stage


class ObjectRow(NamedTuple):
    """Row of objects.csv: one object in one frame."""

    frame: int
    name: str
    id: int
    area: int  # pixels
    centre_x: float
    centre_y: float
    left: int
    top: int
    right: int
    bottom: int


class _Masked(NamedTuple):
    """Frame (H, W, 3) with its timestamp and mask (H, W)."""

    position: int
    frame: np.ndarray
    time: Fraction | None
    mask: np.ndarray


def write_results(
    job: TrackJob, throughput: Throughput, source: str, opacity: float, outline: int | None, files: TrackFiles
) -> dict[str, Any]:
    """Write the results of a run whose masks are complete, and delete its saved state.

    Args:
        job: the finished job.
        throughput: number of frames tracked, and the time it took.
        source: path of the frames, which are read again.
        opacity: opacity of the masks in the overlay.
        outline: width of their outlines in pixels; None: by the frame's size.
        files: further files of the tracks.

    Raises:
        UserError: see `write_track_report`.
    """
    frames_per_s = throughput.items / throughput.seconds
    logger.info(
        "%s in %.1f s: %.2f frames/s including reading and writing",
        count_of(throughput.items, "frame"),
        throughput.seconds,
        frames_per_s,
    )
    tracked = job.tracker.tracked_objects()
    with open_frames(source) as frames:
        objects, report = write_track_report(
            frames, job.folder, opacity=opacity, outline=outline, colours=job.colours, tracked=tracked, files=files
        )
    flicker = job.tracker.flicker()
    if flicker is not None:
        before, after = 100 * flicker["before"], 100 * flicker["after"]
        logger.info("Pixels that change class between frames: %.2f %%, smoothed %.2f %%", before, after)
    result = {
        "input": source,
        "labels": {job.frames.frame_name(position): str(path) for position, path in sorted(job.labels.files.items())},
        "settings": job.tracker.settings,
        "frames": report.items,
        "size": list(job.frames.size),
        "fps": job.frames.fps,
        "objects": objects,
        "frames_timed": throughput.items,
        "frames_per_s": frames_per_s,
        "report_frames_per_s": report.items / report.seconds,
        "flicker": flicker,
        "versions": {"dinoseg": __version__, "torch": torch.__version__},
    }
    # track.json marks the run as finished, so it is written last; without the state, no run can resume here
    write_json(job.folder / RESULT, result)
    (job.folder / STATE).unlink()
    logger.info("Masks, overlay and table are in %s", job.folder)
    return {key: result[key] for key in ("frames", "objects", "frames_per_s")} | {"run": str(job.folder)}


def write_track_report(
    frames: FrameReader,
    folder: Path,
    *,
    opacity: float,
    outline: int | None = None,
    colours: MaskColours = MaskColours(),  # noqa: B008 (frozen)
    tracked: Mapping[int, TrackedObject] | None = None,
    files: TrackFiles = TrackFiles(),  # noqa: B008 (frozen)
) -> tuple[list[int], Throughput]:
    """Write overlay.mp4 and objects.csv to a run folder; return all IDs in its masks, and the throughput.

    The overlay has the timestamps and colours of the input video, as with mode=predict.

    objects.csv has one row per object and frame in which the object is visible. Pixels are counted from 0. Left, top,
    right and bottom are the object's outermost pixels, the centre is the mean of all its pixels. `tracked` adds
    columns of class and score, and `files` names further files of the tracks.

    Raises:
        UserError: a frame or a mask cannot be read, or the disk is full.
    """
    seen: set[int] = set()
    more = {
        number: (colours.classes[found.class_id], round(found.score, 4)) for number, found in (tracked or {}).items()
    }

    def infer(item: _Masked) -> tuple[np.ndarray, _Masked, list[ObjectRow]]:
        rows = object_rows(item.position, frames.frame_name(item.position), item.mask, colours.background)
        overlay = blend(item.frame, item.mask, colours.palette, opacity=opacity, outline=outline)
        return overlay, item, rows

    def write(shown: tuple[np.ndarray, _Masked, list[ObjectRow]]) -> None:
        overlay, item, rows = shown
        video.write(overlay, item.time)
        write_frame(item.position, item.mask)
        table.writerows(csv_cells((*row, *more.get(row.id, ()))) for row in rows)
        seen.update(row.id for row in rows)

    with (
        _table(folder / "objects.csv", () if tracked is None else ("class", "score")) as table,
        VideoWriter(folder / "overlay.mp4", frames.rate, frames.size, like=frames.traits) as video,
        files.open(folder, tracked) as write_frame,
    ):
        throughput = run_pipeline(_with_masks(frames, folder / MASKS), infer, write, depth=_DEPTH)
    return sorted(seen), throughput


def object_rows(position: int, name: str, mask: np.ndarray, background: int | None = 0) -> list[ObjectRow]:
    """Return a row for each object of a mask (H, W) of IDs, without the background."""
    rows: list[ObjectRow] = []
    for label in np.flatnonzero(np.bincount(mask.ravel(), minlength=256)):
        if label == background:
            continue
        here = mask == label
        down, across = np.count_nonzero(here, axis=1), np.count_nonzero(here, axis=0)  # (H,), (W,)
        area = int(down.sum())
        ys, xs = np.flatnonzero(down), np.flatnonzero(across)
        x, y = (round(float((counts @ np.arange(len(counts))) / area), 3) for counts in (across, down))
        box = map(int, (xs[0], ys[0], xs[-1], ys[-1]))
        rows.append(ObjectRow(position, name, int(label), area, x, y, *box))
    return rows


def _with_masks(frames: FrameReader, masks: Path) -> Iterator[_Masked]:
    for position, (frame, time) in enumerate(frames.timed_frames()):
        path = masks / f"{frames.frame_name(position)}.png"
        mask = read_ids(path)
        if mask.shape != frame.shape[:2]:
            raise UserError(f"{path} differs in size from its frame: was it replaced? Track again.")
        yield _Masked(position, frame, time, mask)


@contextmanager
def _table(path: Path, more: Sequence[str]) -> Iterator[Any]:
    """Open a CSV writer whose file gets its name on success and is deleted on an exception."""
    with atomic_file(path) as part, open(part, "w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        writer = csv.writer(file)
        writer.writerow((*ObjectRow._fields, *more))
        yield writer
