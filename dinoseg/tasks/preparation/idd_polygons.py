"""IDD's polygons to label maps, as the official converter draws them; imports no torch."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from dinoseg.data.formats.idd_files import ENCODINGS
from dinoseg.data.label_tables.read import label_table
from dinoseg.utils.errors import UserError

_LONGEST_SIDE = 16384  # pixels; a file that asks for more would only fill the memory
_FARTHEST = 1_000_000  # pixels; Pillow draws points far beyond the picture in the wrong place
_BACKGROUND = "unlabeled"


def draw_label_maps(content: bytes, path: Path, encodings: Iterable[str]) -> tuple[dict[str, np.ndarray], Counter[str]]:
    """Draw the polygons that `content`, the bytes of `path`, holds.

    Return a label map (H, W) uint8 per encoding, and how many objects of each unknown label were left out.

    Objects are filled in the order of the file, later over earlier, without outline. Deleted objects and those of
    fewer than 3 points are left out. An unknown label that ends in `group` is read without it.

    Raises:
        UserError: the file is damaged.
    """
    try:
        return _draw(json.loads(content), encodings)
    except (ValueError, RecursionError) as error:  # also what is no JSON and no UTF-8
        raise UserError(f"{path} is damaged ({error}). Unpack it from the archive again, or correct it.") from None


def _draw(content: Any, encodings: Iterable[str]) -> tuple[dict[str, np.ndarray], Counter[str]]:
    if not isinstance(content, Mapping):
        raise ValueError("it is no JSON object")
    ids = _ids()
    size = _side(content, "imgWidth"), _side(content, "imgHeight")
    canvas = Image.new("L", size, ids[_BACKGROUND])
    pen = ImageDraw.Draw(canvas)
    unknown: Counter[str] = Counter()
    for number, entry in enumerate(_objects(content)):
        label, points = _shape(entry, f"objects[{number}]")
        if len(points) < 3:
            continue
        known = label if label in ids else label.removesuffix("group")
        if known in ids:
            pen.polygon(points, fill=ids[known])
        else:
            unknown[label] += 1
    drawn = np.asarray(canvas)
    return {encoding: _values(encoding)[drawn] for encoding in encodings}, unknown


def _shape(entry: Any, where: str) -> tuple[str, list[tuple[float, float]]]:
    """Return label and points of an object; a deleted one has no points."""
    if not isinstance(entry, Mapping):
        raise ValueError(f"{where} is no object")
    label, points, deleted = entry.get("label"), entry.get("polygon"), entry.get("deleted") or 0
    if not isinstance(deleted, int):
        raise ValueError(f"{where}.deleted={deleted!r} is neither 0 nor 1")
    if deleted:
        return "", []
    if not isinstance(label, str):
        raise ValueError(f"{where}.label={label!r} is no name")
    if not isinstance(points, list):
        raise ValueError(f"{where} ({label}) has no polygon")
    return label, [_point(point, f"{where}.polygon[{number}]") for number, point in enumerate(points)]


def _point(point: Any, where: str) -> tuple[float, float]:
    if not isinstance(point, list) or len(point) != 2 or not all(map(_is_number, point)):
        raise ValueError(f"{where}={str(point)[:80]} is no pair of numbers")
    if not all(abs(value) <= _FARTHEST for value in point):  # also false for NaN
        raise ValueError(f"{where}={str(point)[:80]} lies more than {_FARTHEST} pixels outside of the picture")
    return point[0], point[1]


def _objects(content: Mapping) -> list:
    objects = content.get("objects")
    if not isinstance(objects, list):
        raise ValueError("it has no list named objects")
    return objects


def _side(content: Mapping, key: str) -> int:
    value = content.get(key)
    if value is None:
        raise ValueError(f"it has no {key}")
    if not _is_number(value) or not 1 <= value <= _LONGEST_SIDE or value != int(value):
        raise ValueError(f"{key}={str(value)[:80]} is no number of pixels from 1 to {_LONGEST_SIDE}")
    return int(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@lru_cache
def _ids() -> dict[str, int]:
    return {row["name"]: int(row["id"]) for row in label_table("idd")}


@lru_cache
def _values(encoding: str) -> np.ndarray:
    """Return the value of each raw id in an encoding, uint8."""
    values = [min(int(row[ENCODINGS[encoding]]), 255) for row in label_table("idd")]  # csId 355 does not fit 8 bits
    return np.array(values, dtype=np.uint8)
