"""Common representation of annotation files, before labels are mapped to classes."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from dinoseg.core.sources import MAX_PIXELS
from dinoseg.extensions.annotations.drawing import Form, Polygons
from dinoseg.extensions.annotations.polygon import check_polygon
from dinoseg.utils.wording import format_value, has_surrogates

LARGEST_FILE = 2**30  # bytes of an annotation file


@dataclass(frozen=True, slots=True)
class LabelledShape:
    """Shape with its label.

    A crowd is an area of objects that were not annotated individually; it lies below all other shapes.

    Args:
        label: label of the tool.
        form: the pixels.
        crowd: whether it is a crowd.
        key: COCO: id of the annotation; LabelMe: the group, whose shapes of one label are an object; None: none.
    """

    label: str
    form: Form
    crowd: bool = False
    key: Any = None


@dataclass
class Entry:
    """One image of an annotation file.

    Args:
        path: the annotation file.
        image: the image's file as named in the annotation file.
        size: height and width; None: not in the file, so read from the image.
        shapes: shapes in file order.
        wrong: why the entry cannot be used; empty: it can.
    """

    path: Path
    image: str
    size: tuple[int, int] | None
    shapes: list[LabelledShape] = field(default_factory=list)
    wrong: str = ""


@dataclass(frozen=True)
class Annotations:
    """Contents of an annotation file.

    Args:
        labels: in file order.
        entries: the images.
        groups: label to its group.
        stuff: labels that the file declares to be no things.
        places: of YOLO: entries of data.yaml, such as the folders of each split.
        folder: folder that the names of the images start from; None: the file does not say it.
    """

    labels: Sequence[str]
    entries: Sequence[Entry]
    groups: Mapping[str, str] = field(default_factory=dict)
    stuff: frozenset[str] = frozenset()
    places: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    folder: Path | None = None

    def group_labels(self) -> "Annotations":
        """Return a copy with labels replaced by their groups; a label without group is unchanged.

        Raises:
            ValueError: no label has a group.
        """
        if not self.groups:
            raise ValueError(
                "its labels have no groups (supercategory), which data.reader.shapes.grouped=true requires"
            )
        entries = [
            replace(entry, shapes=[replace(s, label=self.groups.get(s.label, s.label)) for s in entry.shapes])
            for entry in self.entries
        ]
        things = {self.groups.get(label, label) for label in self.labels if label not in self.stuff}
        labels = list(dict.fromkeys(self.groups.get(label, label) for label in self.labels))
        return Annotations(labels, entries, stuff=frozenset(labels) - things if self.stuff else self.stuff)


def size_of(height: Any, width: Any) -> tuple[int, int]:
    """Return height and width, validated.

    Raises:
        ValueError: they are not a valid image size.
    """
    if not all(type(side) is int and side > 0 for side in (height, width)) or height * width > MAX_PIXELS:
        raise ValueError(
            f"height {format_value(height, 20)} and width {format_value(width, 20)} are not an image size: give whole "
            f"numbers above 0, at most {MAX_PIXELS:,} pixels"
        )
    return height, width


def text(value: Any, what: str) -> str:
    """Return a non-empty text, validated.

    Raises:
        ValueError: the value is not a non-empty text, or holds lone surrogates.
    """
    if not isinstance(value, str) or not value.strip() or has_surrogates(value):
        raise ValueError(f"{what} is {format_value(value, 40)}; it must be a name in valid Unicode")
    return value


def check_unique_names(names: Iterable[str], what: str) -> None:
    """Raise a ValueError if a name occurs twice: both would become one class.

    Args:
        names: of classes.
        what: what has these names, for the message.
    """
    name, count = next(iter(Counter(names).most_common(1)), ("", 0))
    if count > 1:
        raise ValueError(f"{format_value(name)} is the name of {count} {what}: make each unique")


def polygons(rings: Sequence[Any], *, is_relative: bool = False) -> Polygons:
    """Return polygons, each a flat list x1, y1, x2, y2, ..., as a form.

    Args:
        rings: the polygons.
        is_relative: see `Polygons`.

    Raises:
        ValueError: a polygon is invalid.
    """
    checked = []
    for ring in rings:
        if not isinstance(ring, list) or len(ring) % 2 or not {*map(type, ring)} <= {int, float}:
            raise ValueError("its polygon is not a list of numbers x1, y1, x2, y2, ...")
        points = points_of(ring)
        check_polygon(points)
        checked.append(points.tobytes())
    return Polygons(tuple(checked), is_relative)


def points_of(values: Sequence[Any]) -> np.ndarray:
    """Return flat numbers as points (N, 2) float64.

    Raises:
        ValueError: a number overflows float64.
    """
    try:
        return np.array(values, np.float64).reshape(-1, 2)
    except OverflowError:
        raise ValueError("its points hold a number larger than any image") from None
