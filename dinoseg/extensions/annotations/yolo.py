"""Parser of YOLO's segmentation files: data.yaml, and a text file of polygons for each image; imports no torch."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dinoseg.extensions.annotations.entry import Annotations, Entry, LabelledShape, polygons, text
from dinoseg.utils.errors import UserError
from dinoseg.utils.files import visible_files
from dinoseg.utils.forms import read_regular
from dinoseg.utils.images import IMAGE_SUFFIXES
from dinoseg.utils.wording import format_value, join_names
from dinoseg.utils.yaml_text import parse_yaml

_MARGIN = 0.01  # that Ultralytics tolerates outside of the image: tools round


def read_yolo(content: bytes, path: Path) -> Annotations:
    """Parse data.yaml: its labels are the names of the classes; `list_yolo_images` adds the images.

    Raises:
        ValueError: it is not such a file, or its text files hold key points.
    """
    whole = parse_yaml(content.decode("utf-8-sig"))
    names = whole.get("names") if isinstance(whole, dict) else None
    if isinstance(names, dict):
        names = [names.get(number) for number in range(len(names))]
    if not isinstance(names, list) or not names:
        raise ValueError("it has no list of classes: add it as `names: [leaf, stem]`")
    if "kpt_shape" in whole:
        raise ValueError("kpt_shape says that its text files hold key points: export polygons (YOLO segmentation)")
    labels = [text(name, f"the name of class {number}") for number, name in enumerate(names)]
    places = {key: value if isinstance(value, list) else [value] for key, value in whole.items() if value}
    return Annotations(labels, [], places=places)


def list_yolo_images(held: Annotations, path: Path, splits: Sequence[str]) -> Annotations:
    """Return the contents of data.yaml with the images of some splits, and the folder that their names start from.

    An entry of a split is a folder, a text file of image paths, or a list of these, relative to `path` in the file or
    to the file's own folder. The polygons of an image are in the text file that the last `images` of its path, replaced
    by `labels`, leads to; without that file, the image has no object.

    Args:
        held: result of `read_yolo`.
        path: data.yaml.
        splits: possible names of the splits.

    Raises:
        UserError: the file has none of the splits, an entry does not exist, or no image has a text file.
    """
    entries = [str(entry) for split in splits for entry in held.places.get(split, ())]
    if not entries:
        raise UserError(
            f"{path} has no entry {splits[0]}. Add one, such as `{splits[0]}: images/{splits[0]}`, or divide the images "
            "of the others by data.reader.partition.by=fraction."
        )
    bases = [path.parent / str(*held.places.get("path", [""])), path.parent]
    folders = []
    images: dict[Path, None] = {}  # ordered set
    for entry in entries:
        place = _find_path(bases, entry)
        if place.is_dir():
            found = [inner / file for inner, files in visible_files(place) for file in files]
            found = [file for file in found if file.suffix.lower() in IMAGE_SUFFIXES]
            folders.append(place)
        elif place.is_file():
            lines = read_regular(place).decode("utf-8-sig", "replace").splitlines()
            found = [_find_path([*bases, place.parent], line.strip()) for line in lines if line.strip()]
            folders += [image.parent for image in found]
        else:
            raise UserError(
                f"{path} names {entry}, but there is no {place}. Correct its entries `path` and {splits[0]}."
            )
        images |= dict.fromkeys(found)
    folder = Path(os.path.commonpath(folders)) if images else path.parent
    texts = [_text_file(image) for image in images]
    if images and not any(map(Path.is_file, texts)):
        raise UserError(
            f"{path}: none of {len(texts)} images has a text file of polygons; the first would be {texts[0]}. Put "
            "them there, or correct the entries of the images."
        )
    pairs = zip(images, texts, strict=True)
    return replace(held, entries=[_read_entry(*pair, folder, path, held.labels) for pair in pairs], folder=folder)


def _find_path(bases: Sequence[Path], name: str) -> Path:
    """Return the first path that exists; Roboflow writes ../ before paths that start in the folder of data.yaml."""
    name = name.replace("\\", "/")
    places = [base / each for base in bases for each in (name, name.removeprefix("../"))]
    return Path(os.path.abspath(next((place for place in places if place.exists()), places[0])))


def _text_file(image: Path) -> Path:
    before, folder, after = image.with_suffix(".txt").as_posix().rpartition("/images/")
    return Path(f"{before}{folder and '/labels/'}{after}")


def _read_entry(image: Path, path: Path, folder: Path, source: Path, labels: Sequence[str]) -> Entry:
    """Return an image with the polygons of its text file; `source`: data.yaml, which stands for a missing one."""
    entry = Entry(path if path.is_file() else source, image.relative_to(folder).as_posix(), None)
    if entry.path == source:
        return entry
    try:
        lines = read_regular(path).decode("utf-8-sig", "replace").splitlines()
    except OSError as error:
        entry.wrong = f"it cannot be read ({error.strerror})"
        return entry
    rows = {line.strip(): number for number, line in enumerate(lines, 1)}  # equal lines are one object
    for row, number in rows.items():
        try:
            entry.shapes += [_parse_row(row, labels)] if row else []
        except ValueError as error:
            entry.wrong = entry.wrong or f"line {number} {error}"
    return entry


def _parse_row(row: str, labels: Sequence[str]) -> LabelledShape:
    """Return the polygon of a row: class, x1, y1, x2, y2, ..., where 1 is the width or height of the image."""
    try:
        number, *values = map(float, row.split())
    except ValueError:
        raise ValueError(f"is {format_value(row, 40)}: write a class and coordinates, all numbers") from None
    if not number.is_integer() or not 0 <= number < len(labels):
        raise ValueError(f"has the class {number:g}, but names in data.yaml has 0 to {len(labels) - 1}")
    if len(values) == 4:
        raise ValueError("is a box (x y width height): export polygons (YOLO segmentation)")
    if len(values) % 2 or len(values) < 6:
        raise ValueError(f"has {len(values)} coordinates: write pairs x y of at least 3 points")
    if outside := [f"{value:g}" for value in values if not -_MARGIN <= value <= 1 + _MARGIN]:  # also NaN
        raise ValueError(
            f"has coordinates outside of 0 to 1: {join_names(outside)}. Divide x by the width of the image and y by "
            "its height"
        )
    form, area = polygons([values], is_relative=True)
    return LabelledShape(labels[int(number)], form, area)
