"""CVAT's XML "CVAT for images 1.1": polygons, boxes, ellipses and masks, with their z_order; imports no torch."""

import math
from collections import Counter
from pathlib import Path
from typing import NoReturn
from xml.parsers import expat

import numpy as np

from dinoseg.annotation import rle
from dinoseg.annotation.drawing import MOST_PIXELS, Box, Form, Polygons
from dinoseg.annotation.entry import Annotations, Entry, Labelled, points_of, size_of, text
from dinoseg.annotation.polygon import FARTHEST, check_polygon
from dinoseg.wording import shown

_DEEPEST = 32
_AREAS = ("polygon", "box", "ellipse", "mask")
_NO_AREAS = ("polyline", "points", "cuboid", "skeleton")
_CORNERS = 720  # of an ellipse


def read_cvat(content: bytes, path: Path) -> Annotations:
    """Return what a file of "CVAT for images 1.1" holds; its labels in the order of its task or project.

    Polygons, boxes and ellipses cover what CVAT's own export of masks draws (by pycocotools), masks their pixels.

    Raises:
        ValueError: it is no such file, declares a document type (which may hold entities that multiply), is of a
            video's tracks, or has shapes that cover nothing, such as lines.
    """
    document = _Document(path)
    parser = expat.ParserCreate()
    parser.StartDoctypeDeclHandler = _refuse_doctype
    parser.StartElementHandler, parser.EndElementHandler = document.start, document.end
    parser.CharacterDataHandler = document.characters
    parser.buffer_text = True
    try:
        parser.Parse(content, True)
    except expat.ExpatError as error:
        raise ValueError(f"it is no XML: {error}") from None
    if not document.is_cvat:
        raise ValueError("it has no element <annotations>, as files of CVAT have")
    return Annotations(list(document.labels), document.entries)


def _refuse_doctype(*_: object) -> NoReturn:
    raise ValueError("it declares a document type (<!DOCTYPE>), which CVAT's files do not and which is not read")


class _Document:
    """What has been read of a file so far."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.is_cvat = False
        self.labels: Counter[str] = Counter()  # in the order of the file
        self.entries: list[Entry] = []
        self._tags: list[str] = []
        self._name = ""

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        if len(self._tags) == _DEEPEST:
            raise ValueError(f"its elements are nested deeper than {_DEEPEST}")
        parent = self._tags[-1] if self._tags else ""
        self.is_cvat |= not self._tags and tag == "annotations"
        self._tags.append(tag)
        self._name = ""
        if tag == "track" and parent == "annotations":
            raise ValueError('it is of the format "CVAT for video": export the task as "CVAT for images 1.1"')
        if tag == "image" and parent == "annotations":
            self.entries.append(_entry(attributes, self.path))
        elif parent == "image" and (tag in _AREAS or tag in _NO_AREAS):
            self._shape(tag, attributes)

    def end(self, tag: str) -> None:
        if self._tags[-3:] == ["labels", "label", "name"] and self._name.strip():
            self.labels[self._name.strip()] += 1
        self._tags.pop()

    def characters(self, text: str) -> None:
        self._name += text[:1000] if len(self._name) < 1000 else ""

    def _shape(self, tag: str, attributes: dict[str, str]) -> None:
        entry = self.entries[-1]
        if entry.wrong:
            return
        try:
            label = text(attributes.get("label"), "its label")
            form = _form(tag, attributes)
            entry.shapes.append(Labelled(label, form, _number(attributes, "z_order", "0")))
        except ValueError as error:
            named = shown(attributes.get("label", ""), 40)
            entry.wrong = f"image {shown(entry.image)}, {tag} {len(entry.shapes)} ({named}): {error}"


def _entry(attributes: dict[str, str], path: Path) -> Entry:
    name = text(attributes.get("name"), "the name of an image")
    try:
        sides = (attributes.get(side, "") for side in ("height", "width"))
        return Entry(
            path, name, size_of(*(int(side) if side.isdecimal() and len(side) < 10 else side for side in sides))
        )
    except ValueError as error:
        return Entry(path, name, (1, 1), wrong=f"image {shown(name)}: {error}")


def _form(tag: str, attributes: dict[str, str]) -> Form:
    if tag in _NO_AREAS:
        raise ValueError("it covers no pixels: draw a polygon or a mask instead, or delete it")
    if tag == "mask":
        return _mask(attributes)
    if tag == "polygon":
        pairs = [pair.split(",") for pair in attributes.get("points", "").split(";")]
        if any(len(pair) != 2 for pair in pairs):
            raise ValueError("its points are no pairs x,y with ; between them")
        points = points_of([_as_number(value, "points") for pair in pairs for value in pair])
    elif tag == "box":
        left, top, right, bottom = (_number(attributes, name) for name in ("xtl", "ytl", "xbr", "ybr"))
        points = points_of([left, top, right, top, right, bottom, left, bottom])
    else:
        middle, radii = ([_number(attributes, name) for name in names] for names in (("cx", "cy"), ("rx", "ry")))
        turns = np.arange(_CORNERS) * (2 * math.pi / _CORNERS)
        points = np.stack([np.cos(turns), np.sin(turns)], axis=1) * radii + middle
    turned = math.radians(_number(attributes, "rotation", "0"))
    if turned:
        centre = (points.min(axis=0) + points.max(axis=0)) / 2
        cos, sin = math.cos(turned), math.sin(turned)
        points = (points - centre) @ np.array([[cos, sin], [-sin, cos]]) + centre
    check_polygon(points)
    return Polygons((points.tobytes(),))


def _mask(attributes: dict[str, str]) -> Form:
    left, top, width, height = (_number(attributes, name) for name in ("left", "top", "width", "height"))
    place = int(left), int(top), int(width), int(height)
    if place != (left, top, width, height) or not (width > 0 and height > 0 and width * height <= MOST_PIXELS):
        raise ValueError(f"its mask has the place {place}, which is no box of pixels")
    if abs(left) > FARTHEST or abs(top) > FARTHEST:
        raise ValueError(f"its mask has the place {place}, which is outside of any picture")
    counts = [value.strip() for value in attributes.get("rle", "").split(",")]
    if not all(count.isdecimal() and len(count) < 10 for count in counts):
        raise ValueError("its rle is no list of whole numbers")
    return Box(place, rle.checked([int(count) for count in counts], place[2] * place[3]).tobytes())


def _number(attributes: dict[str, str], name: str, default: str | None = None) -> float:
    return _as_number(attributes.get(name, default), name)


def _as_number(value: str | None, what: str) -> float:
    try:
        number = float(value) if value is not None and len(value) < 40 else math.nan
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{what} is {shown(value, 40)}, which is no number")
    return number
