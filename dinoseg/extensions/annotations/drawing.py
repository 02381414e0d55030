"""Masks of annotation files: shapes that are rasterised when the mask is read."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dinoseg.core.sources import VirtualMask
from dinoseg.extensions.annotations.polygon import figure, rasterise
from dinoseg.extensions.annotations.rle import decode, from_text, values_of


def check_mask_size(width: int, height: int, image: tuple[int, int]) -> None:
    """Raise a ValueError if a mask has more rows or columns than its image (H, W)."""
    if height > image[0] or width > image[1]:
        raise ValueError(f"its mask has {width} x {height} pixels, but its image only {image[1]} x {image[0]}")


@dataclass(frozen=True, slots=True)
class Polygons:
    """Polygons of one object, whose union is rasterised as by pycocotools; each ring is float64 pairs as bytes."""

    rings: tuple[bytes, ...]

    def paint(self, canvas: np.ndarray, value: int) -> None:
        """Set the pixels of a canvas (H, W) that the shape covers."""
        for ring in self.rings:
            points = np.frombuffer(ring).reshape(-1, 2)
            left, mask = rasterise(points, (canvas.shape[0], canvas.shape[1]))
            canvas[:, left : left + mask.shape[1]][mask] = value


@dataclass(frozen=True, slots=True)
class CompressedColumns:
    """Run lengths of the whole image in COCO's compressed form, column-major, validated; decoded by `paint`."""

    counts: str

    def paint(self, canvas: np.ndarray, value: int) -> None:
        """Set the pixels of a canvas (H, W) that the shape covers."""
        canvas[decode(from_text(self.counts), (canvas.shape[0], canvas.shape[1]))] = value


@dataclass(frozen=True, slots=True)
class Box:
    """Run lengths, row by row, of a box (left, top, width, height) that may exceed the image; int64 as bytes."""

    place: tuple[int, int, int, int]
    counts: bytes

    def paint(self, canvas: np.ndarray, value: int) -> None:
        """Set the pixels of a canvas (H, W) that the shape covers."""
        left, top, width, height = self.place
        mask = values_of(np.frombuffer(self.counts, np.int64)).reshape(height, width)
        mask = mask[max(0, -top) :, max(0, -left) :]
        part = canvas[max(0, top) : max(0, top + height), max(0, left) : max(0, left + width)]
        part[mask[: part.shape[0], : part.shape[1]]] = value


@dataclass(frozen=True, slots=True)
class Figure:
    """Figure of LabelMe, see `polygon.figure`; points are float64 pairs as bytes."""

    kind: str
    points: bytes

    def paint(self, canvas: np.ndarray, value: int) -> None:
        """Set the pixels of a canvas (H, W) that the shape covers."""
        points = [(x, y) for x, y in np.frombuffer(self.points).reshape(-1, 2).tolist()]
        canvas[figure(self.kind, points, (canvas.shape[0], canvas.shape[1]))] = value


Form = Polygons | CompressedColumns | Box | Figure


@dataclass(frozen=True)
class Drawing(VirtualMask):
    """Mask of one image of an annotation file.

    Args:
        path: the annotation file.
        image: the image's name in that file.
        size: height and width of the image.
        ground: id of pixels that no shape covers.
        shapes: id and form of each shape, in drawing order: a later one covers an earlier one.
    """

    path: Path
    image: str
    size: tuple[int, int]
    ground: int
    shapes: Sequence[tuple[int, Form]]
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
        for value, form in self.shapes:
            form.paint(canvas, value)
        return canvas

    def digest(self) -> str:
        """Return a hash of everything that the mask depends on."""
        return hashlib.sha256(repr((self.size, self.ground, *self.shapes)).encode()).hexdigest()
