"""Parser of LabelMe's JSON: polygons, rectangles, circles, lines, points and masks; imports no torch."""

import base64
import io
import math
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np
from PIL import Image

from dinoseg.core.objects import RunLengths
from dinoseg.extensions.annotations.drawing import Box, Figure, Form, check_mask_size
from dinoseg.extensions.annotations.entry import Annotations, Entry, LabelledShape, points_of, size_of, text
from dinoseg.extensions.annotations.polygon import FARTHEST, MAX_RADIUS, check_polygon
from dinoseg.utils import forms
from dinoseg.utils.errors import Unfit
from dinoseg.utils.images import load_whole
from dinoseg.utils.wording import format_text, format_value

_FEWEST = {"polygon": 3, "rectangle": 2, "oriented_rectangle": 4, "circle": 2, "line": 2, "linestrip": 2, "point": 1}
_JOINED = 7  # first version with round corners of linestrips
_EXACTLY = ("rectangle", "oriented_rectangle", "circle", "line", "point")
_FORM = forms.object_with(
    shapes=forms.list_of(forms.object_with(label=forms.plain, points=forms.plain)), imagePath=forms.plain
)


def read_labelme(content: bytes, path: Path) -> Annotations:
    """Parse a LabelMe file; its image is the last part of `imagePath`, and an embedded copy is not read.

    Raises:
        ValueError: it is not a LabelMe file.
    """
    whole = forms.parse_json(content, _FORM)
    image = PureWindowsPath(text(whole["imagePath"], "imagePath")).name  # splits at / and \ alike
    entry = Entry(path, image, None)
    major = str(whole.get("version")).partition(".")[0]
    joined = major.isdecimal() and len(major) < 4 and int(major) >= _JOINED
    try:
        sides = whole.get("imageHeight"), whole.get("imageWidth")
        if sides != (None, None):  # absent in early versions
            entry.size = size_of(*sides)
        for position, shape in enumerate(whole["shapes"]):
            entry.shapes.append(_shape(shape, position, joined, entry.size))
    except ValueError as error:
        entry.wrong = str(error)
    return Annotations(sorted({shape.label for shape in entry.shapes}), [entry])


def _shape(shape: Mapping[str, Any], position: int, joined: bool, size: tuple[int, int] | None) -> LabelledShape:
    try:
        label = text(shape["label"], "its label")
        points = shape["points"]
        if not isinstance(points, list) or not all(_is_point(point) for point in points):
            raise ValueError("its points are not a list of pairs of numbers")
        kind = shape.get("shape_type") or "polygon"
        if kind == "mask":
            return LabelledShape(label, _mask(shape.get("mask"), points, size), key=shape.get("group_id"))
        return LabelledShape(label, _figure(kind, points, joined), key=shape.get("group_id"))
    except ValueError as error:
        raise ValueError(f"shapes[{position}] ({format_value(shape['label'], 40)}): {error}") from None


def _is_point(point: Any) -> bool:
    return isinstance(point, list) and len(point) == 2 and all(type(value) in (int, float) for value in point)


def _figure(kind: Any, points: list[list[float]], joined: bool) -> Form:
    if not isinstance(kind, str) or kind not in _FEWEST:
        raise ValueError(
            f"its shape_type is {format_value(kind, 40)}: it must be one of {', '.join((*_FEWEST, 'mask'))}"
        )
    if len(points) < _FEWEST[kind] or (kind in _EXACTLY and len(points) > _FEWEST[kind]):
        raise ValueError(f"it is a {kind} of {len(points)} points; a {kind} needs {_FEWEST[kind]}")
    values = points_of([value for point in points for value in point])
    if kind == "circle" and not math.dist(*values) <= MAX_RADIUS:  # also false for NaN
        raise ValueError(f"it is a circle of a radius above {MAX_RADIUS} pixels, far away or far larger than any image")
    # repeat the points of a smaller figure, so that the same bounds apply
    check_polygon(values if len(values) >= 3 else np.concatenate([values, values, values]))
    return Figure("joined" if joined and kind == "linestrip" else kind, values.tobytes())


def _mask(mask: Any, points: list[list[float]], size: tuple[int, int] | None) -> Form:
    """Return the mask in the box of two inclusive corners; for fractional corners, the mask's own size applies."""
    if len(points) != 2 or not isinstance(mask, str):
        raise ValueError("it is a mask, which needs two points and an image in base64")
    if size is None:
        raise ValueError("it is a mask, and the file lacks imageHeight and imageWidth, which bound it: add both")
    corners = points_of([value for point in points for value in point])
    if not (np.abs(corners) <= FARTHEST).all():
        raise ValueError(f"its mask lies at {format_value(points, 60)}, outside of any image")
    (left, top), (right, bottom) = corners.round().astype(int).tolist()
    width, height = right - left + 1, bottom - top + 1
    try:
        file = io.BytesIO(base64.b64decode(mask, validate=True))
        with Image.open(file, formats=("PNG",)) as picture:
            if (corners != np.trunc(corners)).any():
                width, height = picture.size
            if width < 1 or height < 1 or picture.width < width or picture.height < height:
                raise ValueError(f"its image is {picture.width} x {picture.height}")
            check_mask_size(picture.width, picture.height, size)  # before the pixels are decoded
            load_whole(picture)
            inside = np.asarray(picture.convert("L"))[:height, :width] > 0
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Unfit) as error:
        raise ValueError(
            f"its mask must be a PNG of {width} x {height} pixels in base64 ({format_text(str(error))})"
        ) from None
    return Box((left, top, width, height), RunLengths.of_mask(inside.T).to_counts(inside.size).tobytes())
