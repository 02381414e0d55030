"""Preparation of IDD: rendering of label maps from its polygons, in several encodings; imports no torch."""

import contextlib
import functools
import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from dinoseg.data.label_tables.read import label_table
from dinoseg.extensions.idd.files import ENCODINGS, LABELS, POLYGONS, files_of, find_parts, label_suffix
from dinoseg.extensions.prepare.jobs import incomplete_error, run_jobs
from dinoseg.report.progress import Bar
from dinoseg.utils import forms
from dinoseg.utils.errors import UserError
from dinoseg.utils.files import check_regular, entries
from dinoseg.utils.images import write_png
from dinoseg.utils.locks import hold_lock
from dinoseg.utils.ranges import Count, check_annotations
from dinoseg.utils.wording import join_names

log = logging.getLogger(__name__)

_PNG_START, _PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"
_NOTE = "polygons sha256"  # PNG keyword in a label map: hash of the polygons that it was rendered from
_HEAD = 4096  # bytes at the start of a label map that contain the note
_UNKNOWN = "unknown label "
_LOCK = ".prepare.lock"  # in gtFine: one run at a time


@dataclass(frozen=True)
class PolygonFile:
    """JSON file of polygons; `split` is the split's folder, after its part."""

    path: Path
    split: str

    def label_map(self, encoding: str) -> Path:
        """Return the path of its label map."""
        return self.path.with_name(self.path.stem.removesuffix(POLYGONS) + label_suffix(encoding) + ".png")


@check_annotations
def prepare(
    root: str | Path,
    *,
    encodings: Sequence[str] = ("level3Id",),
    workers: Count = 2,
    overwrite: bool = False,
) -> dict[str, dict[str, int]]:
    """Render the label maps, resuming where an earlier run stopped; return the counts of each split.

    Existing maps are reused, unless their polygons have changed since.

    Args:
        root: a part, which holds `gtFine`, or a folder of several parts.
        encodings: label maps to render, of `id`, `csId`, `csTrainId`, `level4Id`, `level3Id`, `level2Id`, `level1Id`.
        workers: number of processes.
        overwrite: render existing maps again.

    Raises:
        UserError: there is nothing to prepare, a folder is not writable, the disk is full, or some files failed; the
            last only after all others are finished.
    """
    root = Path(root).expanduser()
    if not encodings or any(encoding not in ENCODINGS for encoding in encodings):
        raise UserError(f"encodings={list(encodings)}: choose some of {', '.join(ENCODINGS)}.")
    jobs = find_polygons(root)
    work = functools.partial(make_label_maps, encodings=tuple(encodings), overwrite=overwrite)
    try:
        with contextlib.ExitStack() as locks:
            for labels in sorted({job.path.parents[2] for job in jobs}):  # by part, which may be prepared alone
                locks.enter_context(hold_lock(labels / _LOCK))
            return _draw_all(root, jobs, work, workers)
    except OSError as error:
        raise UserError(f"Cannot write to root={root}: {error}. Check its permissions.") from None


def _draw_all(
    root: Path, jobs: Sequence[PolygonFile], work: Callable[[PolygonFile], Counter[str]], workers: int
) -> dict[str, dict[str, int]]:
    with Bar(total=len(jobs), desc="rasterising", unit="file") as bar:
        results, failures = run_jobs(work, jobs, bar, workers=workers, root=root, ready="files are rasterised")
    counts: dict[str, Counter[str]] = {job.split: Counter() for job in jobs}
    for job, result in results.items():
        counts[job.split].update(result)
    _report(results)
    if failures:
        lines = [
            str(reason) if isinstance(reason, UserError) else f"{job.path}: {reason}"
            for job, reason in sorted(failures.items(), key=lambda failure: failure[0].path)
        ]
        raise incomplete_error(
            lines, f"{len(failures)} of {len(jobs)} files could not be rasterised, the others are ready"
        )
    return {split: dict(counts[split]) for split in sorted(counts)}


def find_polygons(root: Path) -> list[PolygonFile]:
    """Return the polygon files of all parts and splits.

    Raises:
        UserError: there are none.
    """
    parts = find_parts(root)
    jobs = [
        PolygonFile(path, f"{part}/{split.name}".lstrip("/"))
        for part, folder in parts.items()
        for split in entries(folder / LABELS)
        for path in files_of(split, POLYGONS, (".json",)).values()
    ]
    if not jobs:
        folders = ", ".join(f"{folder / LABELS}" for folder in parts.values())
        raise UserError(
            f"Nothing to prepare: no {{split}}/{{drive}}/{{id}}{POLYGONS}.json in {folders}. Unpack the archives of "
            "IDD with their folder gtFine first."
        )
    return jobs


def make_label_maps(job: PolygonFile, *, encodings: Sequence[str], overwrite: bool) -> Counter[str]:
    """Write the missing, incomplete and outdated label maps of one polygon file; return its counts.

    Raises:
        UserError: the file is damaged.
        OSError: writing failed.
    """
    check_regular(job.path)
    content = job.path.read_bytes()
    source = hashlib.sha256(content).hexdigest()
    there = [encoding for encoding in encodings if _is_complete(job.label_map(encoding))]
    outdated = [encoding for encoding in there if _is_outdated(job.label_map(encoding), job.path, source)]
    due = [encoding for encoding in encodings if overwrite or encoding not in there or encoding in outdated]
    counts = Counter({"files": 1, "written": len(due), "kept": len(encodings) - len(due)})
    if outdated:
        counts["redrawn"] = len(outdated)
    if due:
        maps, unknown = draw_label_maps(content, job.path, due)
        for encoding, pixels in maps.items():
            write_png(job.label_map(encoding), pixels, note=(_NOTE, source))
        counts.update({f"{_UNKNOWN}{label}": count for label, count in unknown.items()})
    return counts


def _is_outdated(label_map: Path, polygons: Path, source: str) -> bool:
    """Return whether a map was rendered from other polygons; without a note of them, file times decide."""
    with label_map.open("rb") as opened:
        head = opened.read(_HEAD)
    if _NOTE.encode() in head:
        return source.encode() not in head
    return polygons.stat().st_mtime_ns > label_map.stat().st_mtime_ns


def _is_complete(path: Path) -> bool:
    """Return whether a PNG exists from start to end, without decoding it."""
    if not path.is_file() or path.stat().st_size < len(_PNG_START) + len(_PNG_END):
        return False
    with path.open("rb") as opened:
        start = opened.read(len(_PNG_START))
        opened.seek(-len(_PNG_END), 2)
        return start == _PNG_START and opened.read() == _PNG_END


def _report(results: Mapping[PolygonFile, Counter[str]]) -> None:
    """Log the counts, and warn once of all labels that are not in the table."""
    counts = sum(results.values(), Counter())
    log.info(
        "%d label maps rasterised, %d of them again since their polygons have changed; %d reused.",
        *(counts[key] for key in ("written", "redrawn", "kept")),
    )
    lines = []
    for key in sorted(key for key in counts if key.startswith(_UNKNOWN)):
        paths = sorted(job.path for job, result in results.items() if key in result)
        lines.append(
            f"\n- {key.removeprefix(_UNKNOWN)} ({counts[key]}): {join_names([str(path) for path in paths], 3)}"
        )
    if lines:
        log.warning("Objects with labels that IDD does not have were left out:%s", "".join(lines))


_BACKGROUND = "unlabeled"
_SIDE = forms.number(1, 16384)  # pixels; a larger size in a file would only fill the memory
_COORDINATE = forms.number(-1_000_000, 1_000_000)  # pixels; Pillow misplaces points far outside the image
_FORM = forms.object_with(imgWidth=_SIDE, imgHeight=_SIDE, objects=forms.list_of(forms.table(forms.plain)))
_OBJECT = forms.object_with(label=forms.text, polygon=forms.list_of(forms.row(_COORDINATE, _COORDINATE)))


def draw_label_maps(content: bytes, path: Path, encodings: Iterable[str]) -> tuple[dict[str, np.ndarray], Counter[str]]:
    """Render the polygons in `content`, the bytes of the file at `path`.

    Objects are filled in the order of the file, later over earlier, without outline. Deleted objects and those with
    fewer than 3 points are left out. An unknown label that ends in `group` is read without this suffix.

    Returns:
        A label map (H, W) uint8 per encoding, and the number of objects of each unknown label, which are left out.

    Raises:
        UserError: the file is damaged.
    """
    try:
        return _draw(forms.parse_json(content, _FORM), encodings)
    except forms.SchemaError as error:
        raise UserError(f"{path} is damaged ({error}). Unpack it from the archive again, or correct it.") from None


def _draw(content: Mapping[str, Any], encodings: Iterable[str]) -> tuple[dict[str, np.ndarray], Counter[str]]:
    ids = _ids()
    canvas = Image.new("L", (int(content["imgWidth"]), int(content["imgHeight"])), ids[_BACKGROUND])
    pen = ImageDraw.Draw(canvas)
    unknown: Counter[str] = Counter()
    for number, entry in enumerate(content["objects"]):
        if forms.read_flag(entry, "deleted", f"objects[{number}]:"):
            continue
        _OBJECT(entry, f"objects[{number}]")
        label = entry["label"]
        points = [(x, y) for x, y in entry["polygon"]]
        if len(points) < 3:
            continue
        known = label if label in ids else label.removesuffix("group")
        if known in ids:
            pen.polygon(points, fill=ids[known])
        else:
            unknown[label] += 1
    drawn = np.asarray(canvas)
    return {encoding: _values(encoding)[drawn] for encoding in encodings}, unknown


@lru_cache
def _ids() -> dict[str, int]:
    return {row["name"]: int(row["id"]) for row in label_table("idd")}


@lru_cache
def _values(encoding: str) -> np.ndarray:
    """Return the value of each raw ID in an encoding, uint8."""
    values = [min(int(row[ENCODINGS[encoding]]), 255) for row in label_table("idd")]  # csId 355 does not fit 8 bits
    return np.array(values, dtype=np.uint8)
