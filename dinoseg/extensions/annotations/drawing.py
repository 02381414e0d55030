"""Masks of annotation files: shapes that are rasterised when the mask is read."""

import hashlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dinoseg.core.objects import RunLengths
from dinoseg.core.sources import VirtualMask
from dinoseg.extensions.annotations.polygon import Patch, draw_figure, rasterise
from dinoseg.extensions.annotations.rle import from_text
from dinoseg.utils.errors import UserError
from dinoseg.utils.files import stamp
from dinoseg.utils.images import read_image
from dinoseg.utils.wording import join_names

_last_file = threading.local()  # of panoptic ids: a thread draws all segments of an image one after another


def check_mask_size(width: int, height: int, image: tuple[int, int]) -> None:
    """Raise a ValueError if a mask has more rows or columns than its image (H, W)."""
    if height > image[0] or width > image[1]:
        raise ValueError(f"its mask has {width} x {height} pixels, but its image only {image[1]} x {image[0]}")


class Form(ABC):
    """Base class of the pixels of a shape, which are drawn when they are read."""

    __slots__ = ()

    @abstractmethod
    def draw(self, size: tuple[int, int]) -> Patch:
        """Return the pixels that the shape covers in an image of `size` (H, W)."""

    def paint(self, canvas: np.ndarray, value: int) -> None:
        """Set the pixels of a canvas (H, W) that the shape covers."""
        patch = self.draw((canvas.shape[0], canvas.shape[1]))
        np.copyto(patch.view(canvas), value, where=patch.mask)


@dataclass(frozen=True, slots=True)
class Polygons(Form):
    """Polygons of one object, whose union is rasterised as by pycocotools.

    Args:
        rings: each is float64 pairs (x, y) as bytes.
        is_relative: whether x is a share of the width of the image, and y of its height, and not pixels.
    """

    rings: tuple[bytes, ...]
    is_relative: bool = False

    def draw(self, size: tuple[int, int]) -> Patch:
        """Return the pixels that the shape covers in an image of `size` (H, W)."""
        unit = (size[1], size[0]) if self.is_relative else (1, 1)
        patches = [rasterise(np.frombuffer(ring).reshape(-1, 2) * unit, size) for ring in self.rings]
        return patches[0] if len(patches) == 1 else _unite(patches)


@dataclass(frozen=True, slots=True)
class CompressedColumns(Form):
    """Run lengths of the whole image in COCO's compressed form, column-major, validated; decoded by `draw`."""

    counts: str

    def draw(self, size: tuple[int, int]) -> Patch:
        """Return the pixels that the shape covers in an image of `size` (H, W)."""
        left, mask = RunLengths.of_counts(from_text(self.counts)).to_columns(size[0])
        return Patch(0, left, mask)


@dataclass(frozen=True, slots=True)
class Box(Form):
    """Run lengths, row by row, of a box (left, top, width, height) that may exceed the image; int64 as bytes."""

    place: tuple[int, int, int, int]
    counts: bytes

    def draw(self, size: tuple[int, int]) -> Patch:
        """Return the pixels that the shape covers in an image of `size` (H, W)."""
        left, top, width, height = self.place
        mask = RunLengths.of_counts(np.frombuffer(self.counts, np.int64)).to_mask((width, height)).T
        first_row, first_column = max(0, top), max(0, left)
        mask = mask[first_row - top : max(0, size[0] - top), first_column - left : max(0, size[1] - left)]
        return Patch(first_row, first_column, mask)


@dataclass(frozen=True, slots=True)
class Figure(Form):
    """Figure of LabelMe, see `polygon.draw_figure`; points are float64 pairs as bytes."""

    kind: str
    points: bytes

    def draw(self, size: tuple[int, int]) -> Patch:
        """Return the pixels that the shape covers in an image of `size` (H, W)."""
        points = [(x, y) for x, y in np.frombuffer(self.points).reshape(-1, 2).tolist()]
        return draw_figure(self.kind, points, size)


@dataclass(frozen=True, slots=True)
class Segment(Form):
    """Pixels of one id in a PNG of COCO's panoptic format, which holds each id as R + 256 G + 256^2 B.

    Args:
        path: the PNG.
        number: the id.
        numbers: the ids of all segments of the image.
    """

    path: Path
    number: int
    numbers: tuple[int, ...] = field(repr=False)

    def draw(self, size: tuple[int, int]) -> Patch:
        """Return the pixels that the shape covers in an image of `size` (H, W).

        Raises:
            UserError: the PNG is unreadable, of another size, or holds other ids than the segments have.
        """
        file = (self.path, self.numbers, stamp(self.path))
        if getattr(_last_file, "key", None) != file:
            _last_file.ids = _read_segment_ids(self.path, self.numbers)
            _last_file.key = file
        ids = _last_file.ids
        if ids.shape != size:
            found = f"{ids.shape[1]} x {ids.shape[0]}"
            raise UserError(
                f"{self.path} is {found} (width x height), its image {size[1]} x {size[0]} by the JSON file. Export "
                "both again."
            )
        return Patch(0, 0, ids == self.number)


def _unite(patches: Sequence[Patch]) -> Patch:
    """Return the pixels of any of some patches of one image."""
    drawn = [patch for patch in patches if patch.mask.size]
    if not drawn:
        return patches[0]
    top = min(patch.top for patch in drawn)
    left = min(patch.left for patch in drawn)
    bottom = max(patch.top + patch.mask.shape[0] for patch in drawn)
    right = max(patch.left + patch.mask.shape[1] for patch in drawn)
    united = np.zeros((bottom - top, right - left), bool)
    for patch in drawn:
        Patch(patch.top - top, patch.left - left, patch.mask).view(united)[patch.mask] = True
    return Patch(top, left, united)


def _read_segment_ids(path: Path, numbers: tuple[int, ...]) -> np.ndarray:
    """Return the ids (H, W) int32 of a PNG, after comparing them with those of its segments."""
    red, green, blue = np.moveaxis(read_image(path).astype(np.int32), 2, 0)
    ids = red + 256 * green + 256**2 * blue
    found = {*np.unique(ids).tolist()} - {0}
    if found != {*numbers}:
        unlisted = join_names([str(number) for number in sorted(found - {*numbers})])
        absent = join_names([str(number) for number in sorted({*numbers} - found)])
        raise UserError(
            f"{path}: ids without a segment in the JSON file: {unlisted or 'none'}; segments without pixels: "
            f"{absent or 'none'}. Export both again."
        )
    return ids


@dataclass(frozen=True)
class Drawing(VirtualMask):
    """Mask of one image of an annotation file.

    Args:
        path: the annotation file.
        image: the image's name in that file.
        size: height and width of the image.
        ground: id of pixels that no shape covers.
        shapes: id and form of each shape, crowds first: a later one covers an earlier one.
        labelled: class id and shape as annotated, in the same order, of which objects are made; the id of a crowd is
            that of its class, even if its pixels are ignored.
        stuff: ids of the classes that the file declares to be no things.
        crowds: number of crowds, which are the first shapes.
        by_area: whether shapes of fewer pixels cover larger ones, apart from crowds; a later one covers an equal one.
    """

    path: Path
    image: str
    size: tuple[int, int]
    ground: int
    shapes: Sequence[tuple[int, Form]]
    labelled: Sequence[tuple[int, Any]] = field(default=(), repr=False, compare=False)
    stuff: frozenset[int] = frozenset()
    crowds: int = 0
    by_area: bool = False
    has_class_ids = True

    @property
    def stated_size(self) -> tuple[int, int]:  # type: ignore[override]
        """The size, which the annotation file states."""
        return self.size

    def __str__(self) -> str:
        return f"{self.path}, image {self.image}"

    def read(self) -> np.ndarray:
        """Return class ids and ignore_index (H, W) uint8."""
        canvas = np.full(self.size, self.ground, np.uint8)
        if self.by_area:
            _paint_small_on_large(canvas, self.shapes[: self.crowds])
            _paint_small_on_large(canvas, self.shapes[self.crowds :])
        else:
            for value, form in self.shapes:
                form.paint(canvas, value)
        return canvas

    def digest(self) -> str:
        """Return a hash of everything that the mask depends on."""
        stamps = [stamp(form.path) for _, form in self.shapes[:1] if isinstance(form, Segment)]
        rules = (self.size, self.ground, self.crowds, self.by_area)
        return hashlib.sha256(repr((*rules, *self.shapes, *stamps)).encode()).hexdigest()


def _paint_small_on_large(canvas: np.ndarray, shapes: Sequence[tuple[int, Form]]) -> None:
    """Set the pixels of a canvas (H, W) to the id of the shape with the fewest pixels there; the last of equal ones.

    A shape is drawn once: its pixels are known only then, and the masks of all shapes may exceed the memory.
    """
    if not shapes:
        return
    smallest = np.full(canvas.shape, np.iinfo(np.int32).max, np.int32)  # pixels of the shape on top
    for value, form in shapes:
        patch = form.draw((canvas.shape[0], canvas.shape[1]))
        pixels = np.count_nonzero(patch.mask)
        is_on_top = patch.mask & (patch.view(smallest) >= pixels)
        np.copyto(patch.view(canvas), value, where=is_on_top)
        np.copyto(patch.view(smallest), pixels, where=is_on_top)
