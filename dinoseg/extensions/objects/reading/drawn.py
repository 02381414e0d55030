"""Objects of annotation files: COCO's annotations and segments, and LabelMe's shapes and groups."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dinoseg.core.object_ids import encode_object, stack_objects
from dinoseg.core.sources import ObjectSource
from dinoseg.data.pairs.dataset import PairDataset
from dinoseg.extensions.annotations.drawing import Drawing, Form
from dinoseg.extensions.annotations.entry import LabelledShape
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
        canvas = np.zeros(self.size, bool)  # only one: a large image per object takes ten times as long
        for value, forms in self.objects:
            for form in forms:
                form.paint(canvas, True)
            pixels = np.flatnonzero(canvas)
            yield value, pixels
            canvas.reshape(-1)[pixels] = False


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
    """Return the objects of an image: its shapes of things, numbered in drawing order."""
    members: dict[object, list[tuple[int, LabelledShape]]] = {}  # key of an object to its shapes
    for position, (class_id, shape) in enumerate(mask.labelled):
        if class_id not in things:
            continue
        key = position if shape.key is None else (class_id if joined else None, repr(shape.key))
        if key in members and not joined:
            raise UserError(f"{mask}: two annotations have the id {shape.key}. Make each unique.")
        members.setdefault(key, []).append((class_id, shape))
    objects = []
    for number, shapes in enumerate(members.values(), 1):
        value = encode_object(number, shapes[0][0], crowd=any(shape.crowd for _, shape in shapes))
        objects.append((value, tuple(shape.form for _, shape in shapes)))
    return DrawnObjects(mask.path, mask.image, mask.size, tuple(objects))
