"""Objects of annotation files: COCO's annotations and segments, and LabelMe's shapes and groups."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dinoseg.core.object_ids import check_object_range, encode_object, stack_objects
from dinoseg.core.sources import ObjectSource
from dinoseg.data.pairs.dataset import PairDataset
from dinoseg.extensions.annotations.drawing import Drawing, Form
from dinoseg.extensions.objects.reading.things import find_things
from dinoseg.utils.errors import UserError
from dinoseg.utils.ranges import Natural


@dataclass(frozen=True)
class DrawnObjects(ObjectSource):
    """Objects of one image of an annotation file, which are rasterised when they are read.

    Args:
        path: the annotation file.
        image: the image's name in that file.
        size: (H, W) of the image.
        objects: value of each object, see `object_ids`, and its forms, whose union it is.
    """

    path: Path
    image: str
    size: tuple[int, int]
    objects: Sequence[tuple[int, tuple[Form, ...]]]

    def __str__(self) -> str:
        return f"{self.path}, image {self.image}"

    @property
    def count(self) -> int:  # type: ignore[override]
        """Return the number of objects, with those that have no pixels."""
        return len(self.objects)

    def read(self) -> np.ndarray:
        """Return the objects (N, H, W) int32."""
        return stack_objects(self._find_pixels(), self.size)

    def digest(self) -> str:
        """Return a hash of everything that the objects depend on but for the files."""
        return hashlib.sha256(repr((self.size, *self.objects)).encode()).hexdigest()

    def _find_pixels(self) -> Iterator[tuple[int, np.ndarray]]:
        for value, forms in self.objects:
            canvas = np.zeros(self.size, np.uint8)
            for form in forms:
                form.paint(canvas, 1)
            yield value, np.flatnonzero(canvas)


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
        raise UserError("data.objects: these masks are not those of shapes with one class per pixel. Leave it out.")
    stuff = masks[0].stuff if masks else frozenset()
    found = find_things(dataset.classes, things, background, stuff)
    return dataset.with_objects([_collect_objects(mask, found, joined=joined) for mask in masks], found)


def _collect_objects(mask: Drawing, things: frozenset[int], *, joined: bool) -> DrawnObjects:
    """Return the objects of an image: its shapes of things, numbered in drawing order."""
    members: dict[object, list[int]] = {}  # key of an object to the positions of its shapes
    for position, ((class_id, _), shape) in enumerate(zip(mask.shapes, mask.labelled, strict=True)):
        if class_id not in things:
            continue
        key = position if shape.key is None else (class_id if joined else None, repr(shape.key))
        if key in members and not joined:
            raise UserError(f"{mask}: two annotations have the id {shape.key}. Make each unique.")
        members.setdefault(key, []).append(position)
    check_object_range(0, len(members), mask)
    objects = []
    for number, positions in enumerate(members.values(), 1):
        crowd = any(mask.labelled[position].crowd for position in positions)
        value = encode_object(number, mask.shapes[positions[0]][0], crowd=crowd)
        objects.append((value, tuple(mask.shapes[position][1] for position in positions)))
    return DrawnObjects(mask.path, mask.image, mask.size, tuple(objects))
