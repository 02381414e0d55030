"""Make IDD ready to read: draw the label maps of its polygons, in as many encodings as wanted; imports no torch."""

import functools
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from dinoseg.data.idd_files import ENCODINGS, LABELS, POLYGONS, files_of, find_parts, label_suffix
from dinoseg.data.idd_polygons import draw_label_maps
from dinoseg.data.wording import listed
from dinoseg.errors import DISK_FULL, UserError
from dinoseg.images import write_png
from dinoseg.processes import in_processes

log = logging.getLogger(__name__)

_PNG_START, _PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"


@dataclass(frozen=True)
class PolygonFile:
    """A JSON file of polygons; `split` is the split's folder with its part in front."""

    path: Path
    split: str

    def label_map(self, encoding: str) -> Path:
        """Return where its label map lies."""
        return self.path.with_name(self.path.stem.removesuffix(POLYGONS) + label_suffix(encoding) + ".png")


def prepare(
    root: str | Path,
    *,
    encodings: Sequence[str] = ("level3Id",),
    workers: int = 2,
    overwrite: bool = False,
) -> dict[str, dict[str, int]]:
    """Draw the label maps, going on where an earlier run stopped; return the counts of each split.

    Args:
        root: a part, which holds `gtFine`, or the folder of several.
        encodings: which label maps, of `id`, `csId`, `csTrainId`, `level4Id`, `level3Id`, `level2Id`, `level1Id`.
        workers: processes.
        overwrite: draw again what is there already.

    Raises:
        UserError: nothing to prepare, a full disk, or, when all others are finished, the files that failed.
    """
    root = Path(root).expanduser()
    if not encodings or any(encoding not in ENCODINGS for encoding in encodings):
        raise UserError(f"data.prepare.encodings={list(encodings)}: choose some of {', '.join(ENCODINGS)}.")
    if workers < 1:
        raise UserError(f"data.prepare.workers={workers}: give the number of processes, 1 or more.")
    jobs = find_polygons(root)
    work = functools.partial(make_label_maps, encodings=tuple(encodings), overwrite=overwrite)
    counts: dict[str, Counter[str]] = {job.split: Counter() for job in jobs}
    failures: dict[Path, str] = {}
    finished = 0
    remedy = f"Set data.prepare.workers below {workers} and run again: it goes on."
    with tqdm(total=len(jobs), desc="drawing", unit="file", disable=None) as bar:
        for job, result in in_processes(work, jobs, workers, catch=(UserError, OSError), in_order=False, remedy=remedy):
            if isinstance(result, OSError) and result.errno in DISK_FULL:
                raise _disk_full(root, finished, len(jobs))
            if isinstance(result, Exception):
                failures[job.path] = str(result) if isinstance(result, UserError) else f"{job.path}: {result}"
            else:
                counts[job.split].update(result)
                finished += 1
            bar.update()
    _remove_parts(jobs)
    _report(counts, failures, len(jobs))
    return {split: dict(counts[split]) for split in sorted(counts)}


def find_polygons(root: Path) -> list[PolygonFile]:
    """Return the polygon files of all parts and splits.

    Raises:
        UserError: there is none.
    """
    parts = find_parts(root)
    jobs = [
        PolygonFile(path, f"{part}/{split.name}".lstrip("/"))
        for part, folder in parts.items()
        for split in sorted(path for path in folder.glob(f"{LABELS}/[!.]*") if path.is_dir())
        for path in files_of(split, POLYGONS, (".json",)).values()
    ]
    if not jobs:
        places = ", ".join(f"{folder / LABELS}" for folder in parts.values())
        raise UserError(
            f"Nothing to prepare: no {{split}}/{{drive}}/{{id}}{POLYGONS}.json in {places}. Unpack the archives of IDD "
            "with their folder gtFine first."
        )
    return jobs


def make_label_maps(job: PolygonFile, *, encodings: Sequence[str], overwrite: bool) -> Counter[str]:
    """Write the label maps of one file of polygons that are not there whole; return its counts.

    Raises:
        UserError: the file is damaged.
        OSError: writing failed.
    """
    due = [encoding for encoding in encodings if overwrite or not _is_whole(job.label_map(encoding))]
    counts = Counter({"files": 1, "written": len(due), "kept": len(encodings) - len(due)})
    if due:
        maps, unknown = draw_label_maps(job.path, due)
        for encoding, pixels in maps.items():
            write_png(job.label_map(encoding), pixels)
        counts.update({f"unknown label {label}": count for label, count in unknown.items()})
    return counts


def _is_whole(path: Path) -> bool:
    """Return whether a PNG is there from start to end, without decoding it."""
    if not path.is_file() or path.stat().st_size < len(_PNG_START) + len(_PNG_END):
        return False
    with path.open("rb") as opened:
        start = opened.read(len(_PNG_START))
        opened.seek(-len(_PNG_END), 2)
        return start == _PNG_START and opened.read() == _PNG_END


def _remove_parts(jobs: Sequence[PolygonFile]) -> None:
    """Remove what a killed run left half-written."""
    for drive in {job.path.parent for job in jobs}:
        for stale in drive.glob(".*_gtFine_label*.part"):
            stale.unlink(missing_ok=True)


def _report(counts: dict[str, Counter[str]], failures: dict[Path, str], total: int) -> None:
    """Warn once of all labels that are not in the table; raise if files failed."""
    unknown = sum(counts.values(), Counter())
    labels = [f"{key.removeprefix('unknown label ')} ({unknown[key]})" for key in unknown if key.startswith("unknown ")]
    if labels:
        log.warning("Objects with labels that IDD does not have were left out: %s.", listed(sorted(labels), 40))
    if failures:
        lines = "".join(f"\n- {failures[path]}" for path in sorted(failures))
        raise UserError(
            f"{len(failures)} of {total} files could not be drawn, the others are ready:{lines}\n"
            "Running again goes on with these."
        )


def _disk_full(root: Path, finished: int, total: int) -> UserError:
    return UserError(
        f"The disk of {root} is full: {finished} of {total} files are drawn and nothing is half-written. Make room and "
        "run again: it goes on."
    )
