"""What a finished tracking run shows, made of its frames and masks on the disk: an overlay video and a table."""

import csv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from dinoseg.errors import UserError
from dinoseg.images import read_ids
from dinoseg.inference.frame_folder import FolderReader
from dinoseg.inference.media import VideoReader, VideoWriter
from dinoseg.inference.stream import Throughput, run_pipeline
from dinoseg.report.overlay import blend, smooth_blocks
from dinoseg.storage.atomic import whole_file
from dinoseg.tracking.video.mask_folder import Look
from dinoseg.tracking.video.state import MASKS

COLUMNS = ("frame", "name", "id", "area", "centre_x", "centre_y", "left", "top", "right", "bottom")
_DEPTH = 4  # frames that wait on either side


def write_track_report(
    frames: VideoReader | FolderReader,
    folder: Path,
    *,
    opacity: float,
    look: Look = Look(),  # noqa: B008 (frozen)
    blocks: tuple[int, int] | None = None,
) -> tuple[list[int], Throughput]:
    """Write overlay.mp4 and objects.csv beside a run's masks; return all ids in them, and the frames and seconds.

    objects.csv has a row for each object in each frame that shows it, and none where it is absent. Pixels are counted
    from 0; left, top, right and bottom are the outermost ones of the object, and its centre the mean of all.

    Where masks after the first show the cells of a grid (h, w) as `blocks`, the overlay gives them smooth outlines.

    Raises:
        UserError: a frame or a mask cannot be read, or the disk is full.
    """
    seen: set[int] = set()

    def infer(item: tuple[int, np.ndarray, np.ndarray]) -> tuple[np.ndarray, list[list[Any]]]:
        position, frame, mask = item
        rows = object_rows(position, frames.frame_name(position), mask, look.background)
        shown = mask if blocks is None or position == 0 else smooth_blocks(mask, blocks)
        return blend(frame, shown, look.palette, opacity=opacity), rows

    def write(done: tuple[np.ndarray, list[list[Any]]]) -> None:
        overlay, rows = done
        video.write(overlay)
        table.writerows(rows)
        seen.update(row[COLUMNS.index("id")] for row in rows)

    with _table(folder / "objects.csv") as table, VideoWriter(folder / "overlay.mp4", frames.fps, frames.size) as video:
        passed = run_pipeline(_with_masks(frames, folder / MASKS), infer, write, depth=_DEPTH)
    return sorted(seen), passed


def object_rows(position: int, name: str, mask: np.ndarray, background: int | None = 0) -> list[list[Any]]:
    """Return a row of `COLUMNS` for each object of a mask (H, W) of ids; the background is none."""
    rows: list[list[Any]] = []
    for label in np.flatnonzero(np.bincount(mask.ravel(), minlength=256)):
        if label == background:
            continue
        here = mask == label
        down, across = np.count_nonzero(here, axis=1), np.count_nonzero(here, axis=0)  # (H,), (W,)
        area = int(down.sum())
        ys, xs = np.flatnonzero(down), np.flatnonzero(across)
        centre = [round(float((counts @ np.arange(len(counts))) / area), 3) for counts in (across, down)]
        rows.append([position, name, int(label), area, *centre, *map(int, (xs[0], ys[0], xs[-1], ys[-1]))])
    return rows


def _with_masks(frames: VideoReader | FolderReader, masks: Path) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    for position, frame in enumerate(frames):
        path = masks / f"{frames.frame_name(position)}.png"
        mask = read_ids(path)
        if mask.shape != frame.shape[:2]:
            raise UserError(f"{path} is of another size than its frame: was it replaced? Track again.")
        yield position, frame, mask


@contextmanager
def _table(path: Path) -> Iterator[Any]:
    """Give a CSV writer whose file takes its name at the end, or vanishes on an exception."""
    with whole_file(path) as part, open(part, "w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        yield writer
