"""Masks that are no single file: shapes of an annotation file, rasterised when the mask is read, and layers."""

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dinoseg.data.annotation.polygon import figure, rasterise
from dinoseg.data.annotation.rle import decode, from_text, values_of
from dinoseg.utils.errors import UserError
from dinoseg.utils.files import stamp
from dinoseg.utils.images import read_ids_of_page

MAX_PIXELS = 178_956_970  # per image: Pillow's own limit


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
class Drawing:
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

    def __str__(self) -> str:
        return f"{self.path}, image {self.image}"

    def stat(self) -> os.stat_result:
        """Return the annotation file's size and times."""
        return self.path.stat()

    def read(self) -> np.ndarray:
        """Return class ids and ignore_index (H, W) uint8."""
        canvas = np.full(self.size, self.ground, np.uint8)
        for value, form in self.shapes:
            form.paint(canvas, value)
        return canvas

    def digest(self) -> str:
        """Return a hash of everything that the mask depends on."""
        return hashlib.sha256(repr((self.size, self.ground, *self.shapes)).encode()).hexdigest()


@dataclass(frozen=True)
class MaskPage:
    """Page of a TIFF file that is the mask of one class.

    Args:
        path: the file.
        index: index of the page.
        count: number of pages that the file must have.
    """

    path: Path
    index: int
    count: int

    def __str__(self) -> str:
        return f"page {self.index + 1} of {self.path}"

    def stat(self) -> os.stat_result:
        """Return the file's size and times."""
        return self.path.stat()

    def read(self) -> np.ndarray:
        """Return the stored numbers, see `read_ids_of_page`."""
        return read_ids_of_page(self.path, self.index, self.count)

    def digest(self) -> str:
        """Return a text that differs for each page."""
        return f"{self.index}/{self.count}"


@dataclass(frozen=True)
class Layers:
    """Mask of an image with a layer for each class, so that classes may overlap.

    Args:
        sources: file, page or drawing of each class, in id order; None for a class that the image does not show.
        read_layer: returns a source as (H, W) uint8: 1 where the class is, 0, or ignore_index.
    """

    sources: Sequence[Path | MaskPage | Drawing | None]
    read_layer: Callable[[Any], np.ndarray]

    def __str__(self) -> str:
        files = (source.path if isinstance(source, MaskPage) else source for source in self.present_sources)
        return ", ".join(dict.fromkeys(map(str, files)))

    @property
    def present_sources(self) -> list[Path | MaskPage | Drawing]:
        """Return the sources of the classes that have one."""
        return [source for source in self.sources if source is not None]

    @property
    def path(self) -> Path:
        """Return the file of the first layer."""
        return mask_file(self.present_sources[0])

    def stat(self) -> os.stat_result:
        """Return that file's size and times."""
        return self.path.stat()

    def read(self) -> np.ndarray:
        """Return the layers (K, H, W) uint8.

        Raises:
            UserError: a file is unreadable or holds other numbers, or two files differ in size.
        """
        layers = [None if source is None else self.read_layer(source) for source in self.sources]
        sizes = {layer.shape for layer in layers if layer is not None}
        if len(sizes) > 1:
            found = ", ".join(f"{width} x {height}" for height, width in sorted(sizes))
            raise UserError(f"The masks {self} differ in size: {found} (width x height). Make them equal.")
        empty = np.zeros(sizes.pop(), np.uint8)
        return np.stack([empty if layer is None else layer for layer in layers])

    def digest(self) -> str:
        """Return a hash of everything that the mask depends on."""
        parts = [source and (mask_key(source), stamp(source)) for source in self.sources]
        return hashlib.sha256(repr(parts).encode()).hexdigest()


MaskSource = Path | MaskPage | Drawing | Layers


def mask_file(mask: MaskSource) -> Path:
    """Return the file that contains a mask, or its first layer."""
    return mask if isinstance(mask, Path) else mask.path


def drawn_size(mask: MaskSource) -> tuple[int, int] | None:
    """Return the stated height and width of a mask from an annotation file, without drawing it; None for mask files."""
    source = mask.present_sources[0] if isinstance(mask, Layers) else mask
    return source.size if isinstance(source, Drawing) else None


def mask_key(mask: MaskSource) -> str:
    """Return a text that identifies a mask, apart from the state of its file."""
    suffix = "" if isinstance(mask, Path) else f"#{mask.digest()}"
    return f"{os.path.abspath(mask_file(mask))}{suffix}"
