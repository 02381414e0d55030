"""Objects of annotation files: COCO's annotations and segments, and LabelMe's shapes and groups."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dinoseg.core.object_ids import encode_object, stack_objects
from dinoseg.core.sources import ObjectSource
from dinoseg.data.pairs.dataset import PairDataset
from dinoseg.extensions.annotations.drawing import Drawing, Form
from dinoseg.extensions.annotations.entry import LabelledShape
from dinoseg.extensions.objects.reading.things import find_things
from dinoseg.utils.errors import UserError
from dinoseg.utils.ranges import Natural


class DrawnObject(NamedTuple):
    """Object of an annotation file.

    Attributes:
        class_id: its class.
        is_crowd: whether it is an area of objects that were not separated.
        forms: of its parts, whose union it is.
    """

    class_id: int
    is_crowd: bool
    forms: tuple[Form, ...]


@dataclass(frozen=True)
class DrawnObjects(ObjectSource):
    """Objects of one image of an annotation file, which are rasterised when they are read.

    Args:
        path: the annotation file.
        image: the image's name in that file.
        size: (H, W) of the image.
        objects: the objects, crowds first.
        by_area: whether those with the most pixels are numbered first, apart from crowds; else in their order.
    """

    path: Path
    image: str
    size: tuple[int, int]
    objects: Sequence[DrawnObject]
    by_area: bool = False

    def __str__(self) -> str:
        return f"{self.path}, image {self.image}"

    @property
    def count(self) -> int:  # type: ignore[override]
        """Return the number of objects, with those that have no pixels."""
        return len(self.objects)

    def read(self) -> np.ndarray:
        """Return the objects (N, H, W) int32."""
        found = [(each, self._find_pixels(each)) for each in self.objects]
        if self.by_area:
            # as in the mask: of equal ones, the later one has the higher number, and covers the other
            found.sort(key=lambda pair: (not pair[0].is_crowd, -pair[1].size))
        values = [encode_object(n, each.class_id, crowd=each.is_crowd) for n, (each, _) in enumerate(found, 1)]
        return stack_objects(zip(values, (pixels for _, pixels in found), strict=True), self.size)

    def digest(self) -> str:
        """Return a hash of everything that the objects depend on but for the files."""
        return hashlib.sha256(repr((self.size, self.by_area, *self.objects)).encode()).hexdigest()

    def _find_pixels(self, each: DrawnObject) -> np.ndarray:
        """Return the pixels of an object as indices (M,) of the flat image."""
        parts = []
        for form in each.forms:
            top, left, mask = form.draw(self.size)
            rows = np.repeat(np.arange(len(mask)), np.count_nonzero(mask, axis=1))  # faster than `np.nonzero`
            # index in the image = index in the drawn box + first + row * (W - w)
            first = top * self.size[1] + left
            parts.append(first + np.flatnonzero(mask) + rows * (self.size[1] - mask.shape[1]))
        return parts[0] if len(parts) == 1 else np.unique(np.concatenate(parts))


def add_drawn_objects(
    dataset: PairDataset, *, joined: bool, things: Sequence[str] | None = None, background: Natural | None = None
) -> PairDataset:
    """Return a dataset of annotation files with the objects of its things.

    Args:
        dataset: result of `annotated_dataset`.
        joined: of LabelMe: shapes of one class and group are one object. Otherwise equal ids are an error.
        things: see `find_things`.
        background: id of the class that is no object.

    Raises:
        UserError: the masks are not drawn from shapes or have layers, or two objects of an image have one id.
    """
    masks = [pair.mask for pair in dataset.pairs if isinstance(pair.mask, Drawing)]
    if len(masks) < len(dataset):
        raise UserError(
            "Objects of annotation files need masks of shapes with one class per pixel. Set task=semantic, or choose "
            "data without objects, such as data=coco or data=labelme."
        )
    stuff = masks[0].stuff if masks else frozenset()
    found = find_things(dataset.classes, things, background, stuff)
    return dataset.with_objects([_collect_objects(mask, found, joined=joined) for mask in masks], found)


def _collect_objects(mask: Drawing, things: frozenset[int], *, joined: bool) -> DrawnObjects:
    """Return the objects of an image: its shapes of things."""
    members: dict[object, list[tuple[int, LabelledShape]]] = {}  # key of an object to its shapes
    for position, (class_id, shape) in enumerate(mask.labelled):
        if class_id not in things:
            continue
        # shapes without an id or group are an object each
        key = position if shape.key is None else (class_id if joined else None, repr(shape.key))
        if key in members and not joined:
            raise UserError(f"{mask}: two annotations have the id {shape.key}. Make each unique.")
        members.setdefault(key, []).append((class_id, shape))
    objects = tuple(
        DrawnObject(shapes[0][0], any(shape.crowd for _, shape in shapes), tuple(shape.form for _, shape in shapes))
        for shapes in members.values()
    )
    return DrawnObjects(mask.path, mask.image, mask.size, objects, mask.by_area)
