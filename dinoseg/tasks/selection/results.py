"""Output of a selection: lists, a contact sheet, and the chosen images under their own names."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dinoseg.data.video.access import VideoFrame, read_source
from dinoseg.report.contact_sheet import contact_sheet
from dinoseg.tasks.selection.pool import PoolImage
from dinoseg.tasks.selection.selector import Pick
from dinoseg.utils.atomic import whole_file, write_json, write_text
from dinoseg.utils.csv_text import write_csv_table
from dinoseg.utils.images import write_png
from dinoseg.utils.wording import one_line

FOLDER = "images"  # in the run folder
_SHOWN = 60  # images on the contact sheet
_LINES = 20  # rows printed on the terminal


def write_selection(out_dir: Path, chosen: Sequence[tuple[PoolImage, Pick]], by: str) -> None:
    """Write the chosen images in their order, and print the first of them.

    selection.csv and selection.json list name, file, frame, time and reason of each image; selection.txt lists only
    names. contact_sheet.png shows the first 60. images/ holds copies: image files byte by byte, video frames as PNGs.

    Args:
        out_dir: the run folder.
        chosen: at least one image.
        by: name of the selector.

    Raises:
        UserError: an image cannot be read.
        OSError: a file cannot be written.
    """
    rows = [_row(order, *each) for order, each in enumerate(chosen, start=1)]
    for candidate, _ in chosen:
        _copy(candidate, out_dir / FOLDER)
    write_png(out_dir / "contact_sheet.png", contact_sheet([_shown(*each) for each in chosen[:_SHOWN]]))
    write_json(out_dir / "selection.json", {"by": by, "chosen": rows})
    write_csv_table(out_dir / "selection.csv", list(rows[0]), rows)
    write_text(out_dir / "selection.txt", "".join(f"{candidate.name}\n" for candidate, _ in chosen))
    for row in rows[:_LINES]:
        at = "" if row["time"] is None else f" at {row['time']:g} s"
        print(f"{row['order']:4}  {one_line(row['name'])}{at}: {one_line(row['reason'])}")
    if len(rows) > _LINES:
        print(f"      and {len(rows) - _LINES} more, in selection.csv")
    first = "" if len(rows) <= _SHOWN else f" (the first {_SHOWN})"
    print(f"overview:     {out_dir / 'contact_sheet.png'}{first}")
    print(f"to label:     {out_dir / FOLDER}; listed in selection.csv, selection.json and selection.txt")


def _row(order: int, candidate: PoolImage, pick: Pick) -> dict[str, Any]:
    source = candidate.source
    path, frame = (source.path, source.index) if isinstance(source, VideoFrame) else (source, None)
    time = None if candidate.time is None else round(candidate.time, 3)
    names = {"order": order, "name": candidate.name, "file": str(path), "frame": frame, "time": time}
    return {**names, "reason": pick.reason}


def _copy(candidate: PoolImage, folder: Path) -> None:
    source = candidate.source
    if isinstance(source, VideoFrame):
        write_png(folder / f"{candidate.name}.png", source.read())
    else:
        with whole_file(folder / f"{candidate.name}{source.suffix}") as part:
            shutil.copyfile(source, part)


def _shown(candidate: PoolImage, pick: Pick) -> tuple[str, np.ndarray]:
    at = "" if candidate.time is None else f", {candidate.time:.1f} s"
    return f"{candidate.name}{at}", read_source(candidate.source)
