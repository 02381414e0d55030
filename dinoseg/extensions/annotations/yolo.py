"""Parser of YOLO's segmentation files: data.yaml, and a text file of polygons for each image; imports no torch."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dinoseg.extensions.annotations.entry import (
    Annotations,
    Entry,
    LabelledShape,
    check_unique_names,
    polygons,
    text,
)
from dinoseg.utils.errors import UserError
from dinoseg.utils.files import visible_files
from dinoseg.utils.forms import read_regular
from dinoseg.utils.images import IMAGE_SUFFIXES
from dinoseg.utils.wording import count_of, format_text, join_names
from dinoseg.utils.yaml_text import parse_yaml

_MARGIN = 0.01  # that Ultralytics tolerates outside of the image: tools round


def read_yolo(content: bytes, path: Path) -> Annotations:
    """Parse data.yaml: its labels are the names of the classes; `list_yolo_images` adds the images.

    Raises:
        ValueError: it is not such a file, two classes have one name, or its text files hold key points.
    """
    whole = parse_yaml(content.decode("utf-8-sig"))
    names = whole.get("names") if isinstance(whole, dict) else None
    if isinstance(names, dict):
        names = [names.get(number) for number in range(len(names))]
    if not isinstance(names, list) or not names:
        raise ValueError("it has no list of classes: add it as `names: [leaf, stem]`")
    if "kpt_shape" in whole:
        raise ValueError("kpt_shape declares key points in its text files: export polygons (YOLO segmentation)")
    labels = [text(name, f"the name of class {number}") for number, name in enumerate(names)]
    check_unique_names(labels, "classes")
    places = {key: value if isinstance(value, list) else [value] for key, value in whole.items() if value}
    return Annotations(labels, [], places=places)


def list_yolo_images(held: Annotations, path: Path, splits: Sequence[str]) -> Annotations:
    """Return the contents of data.yaml with the images of some splits, and the folder that their names start from.

    An entry of a split is a folder, a text file of image paths, or a list of these, relative to `path` in the file or
    to the file's own folder. The polygons of an image are in the text file that the last `images` of its path, replaced
    by `labels`, leads to; without that file, the image has no object. Names start from the folder of an entry, or for
    text files of paths from that of data.yaml.

    Args:
        held: result of `read_yolo`.
        path: data.yaml.
        splits: possible names of the splits.

    Raises:
        UserError: the file has none of the splits, an entry does not exist, or no image has a text file.
    """
    places = [str(place) for split in splits for place in held.places.get(split, ())]
    if not places:
        raise UserError(
            f"{path} has no entry {splits[0]}. Add one, such as `{splits[0]}: images/{splits[0]}`, or divide the "
            "images of the others: data.reader.partition.by=fraction."
        )
    bases = [*(path.parent / str(base) for base in held.places.get("path", ())), path.parent]
    folders = []
    images: dict[Path, None] = {}  # ordered set
    for name in places:
        place = _find_path(bases, name)
        if not os.path.exists(place):  # also of names too long for the file system
            raise UserError(f"{path} names {name}, but there is no {place}. Correct its entries.")
        folders.append(place if place.is_dir() else path.parent)
        images |= dict.fromkeys(_images_at(place, bases))
    folder = Path(os.path.commonpath([*folders, *images]))
    entries = [_read_entry(image, folder, path, held.labels) for image in images]
    if entries and all(entry.path == path for entry in entries):
        raise UserError(
            f"{path}: no text file of polygons was found for {count_of(entries, 'image')}, such as "
            f"{find_text_file(next(iter(images)))}. Put them there, or correct the entries of the images."
        )
    return replace(held, entries=entries, folder=folder)


def _find_path(bases: Sequence[Path], name: str) -> Path:
    """Return the first path that exists; Roboflow writes ../ before paths that start in the folder of data.yaml."""
    name = name.replace("\\", "/")
    places = [base / each for base in bases for each in (name, name.removeprefix("../"))]
    return Path(os.path.abspath(next(filter(os.path.exists, places), places[0])))


def _images_at(place: Path, bases: Sequence[Path]) -> list[Path]:
    """Return the images in a folder, or those that a text file lists."""
    if place.is_dir():
        files = [folder / file for folder, names in visible_files(place) for file in names]
        return [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
    lines = read_regular(place).decode("utf-8-sig", "replace").splitlines()
    return [_find_path([*bases, place.parent], line.strip()) for line in lines if line.strip()]


def find_text_file(image: Path) -> Path:
    """Return where Ultralytics looks for the polygons of an image."""
    before, folder, after = image.with_suffix(".txt").as_posix().rpartition("/images/")
    return Path(f"{before}{folder and '/labels/'}{after}")


def _read_entry(image: Path, folder: Path, source: Path, labels: Sequence[str]) -> Entry:
    """Return an image with the polygons of its text file; `source`: data.yaml, which stands for a missing one."""
    path = find_text_file(image)
    entry = Entry(path if os.path.isfile(path) else source, image.relative_to(folder).as_posix(), None)
    if entry.path == path:
        try:
            lines = read_regular(path).decode("utf-8-sig", "replace").splitlines()
            rows = {line.strip(): number for number, line in enumerate(lines, 1)}  # equal lines are one object
            entry.shapes += [_parse_row(row, number, labels) for row, number in rows.items() if row]
        except (OSError, ValueError) as error:
            entry.wrong = str(error)
    return entry


def _parse_row(row: str, line: int, labels: Sequence[str]) -> LabelledShape:
    """Return the polygon of a row: class, x1, y1, x2, y2, ..., where 1 is the width or height of the image."""
    try:
        number, *values = map(float, row.split())
    except ValueError:
        raise ValueError(f"line {line} is {format_text(row, 40)}: write a class and coordinates, all numbers") from None
    if not number.is_integer() or not 0 <= number < len(labels):
        raise ValueError(f"line {line} has the class {number:g}, but names in data.yaml has 0 to {len(labels) - 1}")
    if len(values) % 2 or len(values) < 6:
        box = " (a box has 4: export polygons, YOLO segmentation)" if len(values) == 4 else ""
        raise ValueError(f"line {line} has {len(values)} coordinates{box}: write pairs x y of at least 3 points")
    if outside := [f"{value:g}" for value in values if not -_MARGIN <= value <= 1 + _MARGIN]:  # also NaN
        raise ValueError(
            f"line {line} has coordinates outside of 0 to 1: {join_names(outside)}. Divide x by the width of the image "
            "and y by its height"
        )
    return LabelledShape(labels[int(number)], polygons([values], is_relative=True))
