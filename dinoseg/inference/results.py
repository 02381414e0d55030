"""Result files of predicted images, one folder per image, and the record from which a stopped run resumes."""

import csv
import glob
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np

from dinoseg.core.channels import ChannelFiles
from dinoseg.core.objects import Objects
from dinoseg.core.shapes import Palette
from dinoseg.core.sources import first_file
from dinoseg.report.object_overlay import draw_prediction, object_legend
from dinoseg.report.overlay import blend, legend_of, side_by_side
from dinoseg.report.table import class_statistics
from dinoseg.utils import forms
from dinoseg.utils.atomic import atomic_folder, write_json, write_text
from dinoseg.utils.csv_text import write_csv, write_csv_table
from dinoseg.utils.errors import UserError
from dinoseg.utils.files import expand_path, stamp
from dinoseg.utils.images import write_png
from dinoseg.utils.levels import to_display
from dinoseg.utils.units import read_valid_note

OBJECT_FILE = "objects.csv"  # in the folder of an image
COUNT_FILE = "counts.csv"  # in the run folder
_OBJECT_COLUMNS = ("number", "class_id", "class", "score", "area", "left", "top", "width", "height")
NOTE_FOLDER = "predicted"  # in the run folder: NAME.json for each input with complete results


def write_image_results(
    folder: Path,
    image: np.ndarray,
    mask: np.ndarray,
    *,
    classes: Sequence[str],
    palette: Palette,
    ignore_index: int = 255,
    opacity: float = 0.5,
    objects: Objects | None = None,
) -> None:
    """Write the results of an image (H, W, C) with class IDs (H, W) or layers (K, H, W) uint8 to `folder`.

    They replace an older result. Files: original.png, segmentation_raw.npy, segmentation_colored.png, comparison.png
    (image and overlay side by side, with a legend) and class_statistics.txt. The overlay shows `objects` if
    they are given, even if there are none, else classes. objects.csv lists them, with their numbers in the overlay.
    """
    image = to_display(image)
    overlay = draw_prediction(image, mask, objects, palette, ignore_index=ignore_index, opacity=opacity)
    legend = (
        legend_of([mask], classes, palette, ignore_index=ignore_index)
        if objects is None
        else object_legend(objects, classes, palette)
    )
    caption = "segmentation" if objects is None else "objects"
    with atomic_folder(folder) as part:
        write_png(part / "original.png", image)
        np.save(part / "segmentation_raw.npy", mask)
        colours = blend(image, mask, palette, ignore_index=ignore_index, opacity=1)
        write_png(part / "segmentation_colored.png", colours)
        write_png(part / "comparison.png", side_by_side([("image", image), (caption, overlay)], legend))
        write_text(part / "class_statistics.txt", class_statistics(mask, classes))
        if objects is not None:
            write_csv_table(part / OBJECT_FILE, _OBJECT_COLUMNS, _list_objects(objects, classes))


def _list_objects(objects: Objects, classes: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield the row of each object, by `_OBJECT_COLUMNS`; areas and boxes are in pixels."""
    for place, box in enumerate(objects.boxes.tolist()):
        label = int(objects.classes[place])
        values = (place + 1, label, classes[label], float(objects.scores[place]), objects.masks[place].area, *box)
        yield dict(zip(_OBJECT_COLUMNS, values, strict=True))


def write_counts(run_folder: Path, names: Sequence[str], things: Mapping[int, str]) -> dict[str, int]:
    """Write counts.csv, the number of objects of each thing in each image, from their objects.csv; return the sums.

    The first column is `image`; a thing of that name has the column `image (class)`.

    Args:
        run_folder: holds the folders of the images.
        names: of their results; an image without any is left out.
        things: names of the classes that have objects, by id.
    """
    rows: list[list[Any]] = []
    for name in names:
        path = run_folder / f"{name}_segmentation" / OBJECT_FILE
        if path.is_file():
            with path.open(newline="", encoding="utf-8") as file:
                found = Counter(int(row["class_id"]) for row in csv.DictReader(file))
            rows.append([name, *(found[thing] for thing in things)])
    heads = [f"{label} (class)" if label == "image" else label for label in things.values()]
    write_csv(run_folder / COUNT_FILE, [["image", *heads], *rows])
    return {label: sum(row[column] for row in rows) for column, label in enumerate(things.values(), 1)}


def result_names(paths: Sequence[Path]) -> list[str]:
    """Return a unique name for each input's results: its stem, or a longer form if several inputs share the stem.

    `a/x.jpg` and `b/x.jpg` become `a_x_jpg` and `b_x_jpg`. Names are compared case-insensitively, since some file
    systems ignore case.
    """
    parent = Path(os.path.commonpath([path.absolute().parent for path in paths]))
    inner = [path.absolute().relative_to(parent) for path in paths]
    return _make_distinct([path.stem for path in inner], ["_".join(path.parts).replace(".", "_") for path in inner])


def check_failures(failures: Sequence[str], inputs: int, folder: Path) -> None:
    """Refuse to end well if some of the `inputs` failed, whose messages are given; the others are in `folder`.

    Raises:
        UserError: with all messages.
    """
    if failures:
        named = "".join(f"\n  {message}" for message in failures)
        raise UserError(f"{len(failures)} of {inputs} inputs failed; the others are in {folder}:{named}")


def mask_names(paths: Sequence[Path], source: str) -> list[str]:
    """Return the mask path of each image without suffix: the image's path relative to what `source` names.

    Below a folder or the fixed part of a pattern, `a/x.jpg` becomes `a/x`, as in a dataset. If `a/x.png` exists too,
    the two become `a/x_jpg` and `a/x_png`. Names that differ in case alone stay if the images show that the disk
    distinguishes them.
    """
    root = expand_path(source, ".jpg")
    if not root.exists():  # a glob pattern
        parts = list(takewhile(lambda part: not glob.has_magic(part), root.parts))
        root = Path(*parts)
    top = (root if root.is_dir() else root.parent).absolute()
    inner = [path.absolute().relative_to(top).as_posix() for path in paths]
    # `X.png` next to `x.png`, but not next to `x.jpg`
    is_case_sensitive = len({name.casefold() for name in inner}) < len(inner)
    key = str if is_case_sensitive else str.casefold
    return _make_distinct([name.rpartition(".")[0] for name in inner], [name.replace(".", "_") for name in inner], key)


def _make_distinct(names: Sequence[str], longer: Sequence[str], key: Callable[[str], str] = str.casefold) -> list[str]:
    """Return each name, or its longer form if several names have an equal `key`; taken longer forms are numbered."""
    counts = Counter(map(key, names))
    taken = {name for name, count in counts.items() if count == 1}
    apart: list[str] = []
    for name, base in zip(names, longer, strict=True):
        if counts[key(name)] > 1:
            name, number = base, 2
            while key(name) in taken:
                name = f"{base}_{number}"
                number += 1
            taken.add(key(name))
        apart.append(name)
    return apart


class DoneInputs:
    """Inputs whose results in a run folder are complete, identified by the stamps of their files."""

    def __init__(self, run_folder: Path) -> None:
        self._folder = run_folder / NOTE_FOLDER
        self._found: dict[str, dict[str, Any]] = {}  # inputs with their stamps from before they were read
        self._done: set[str] = set()

    def holds(self, name: str, source: Path | ChannelFiles, results: Sequence[Path]) -> bool:
        """Return whether an input is done: its record matches the file's stamp, and all its results exist.

        Call this before reading the file. The stamp taken here is what `note` records, so a file replaced in the
        meantime is not mistaken for the source of the results.
        """
        unfit = f"{source} is predicted again: the file has changed, or its results are missing."
        made_from = self._found[name] = self._made_from(source)
        is_done = (
            read_valid_note(
                self._folder / f"{name}.json",
                lambda note: forms.read_json(note, forms.plain),
                lambda noted: noted == made_from and all(result.exists() for result in results),
                damaged="%s cannot be read (%s): its input is predicted again.",
                unfit=unfit,
            )
            is not None
        )
        if is_done:
            self._done.add(name)
        return is_done

    def is_done(self, name: str) -> bool:
        """Return whether an input that `holds` was called for is done, in this run or before."""
        return name in self._done

    def note(self, name: str) -> None:
        """Record that all results of an input are written; `holds` must have been called for it before."""
        write_json(self._folder / f"{name}.json", self._found[name])
        self._done.add(name)

    def _made_from(self, source: Path | ChannelFiles) -> dict[str, Any]:
        absolute = str(first_file(source).absolute()).encode(errors="backslashreplace").decode()
        return {"input": absolute, "stamp": list(stamp(source) or ())}
