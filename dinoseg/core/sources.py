"""Sources of pixels: the path of a file, or an object that reads an image or a mask from one or several files."""

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dinoseg.utils.errors import UserError
from dinoseg.utils.files import stamp
from dinoseg.utils.images import TIFF_SUFFIXES, is_deep, read_ids_of_page, read_image, read_valid
from dinoseg.utils.levels import find_peaks, read_levels

MAX_PIXELS = 178_956_970  # per image: Pillow's own limit


class VirtualImage(ABC):
    """Base class of images that no single RGB file holds, such as several files of channels or a frame of a video."""

    path: Path  # the first or only file
    is_file: bool = True  # whether its files hold this image alone

    @property
    @abstractmethod
    def paths(self) -> list[Path]:
        """All files that the image is read from; a UserError if one is missing."""

    @property
    @abstractmethod
    def rule(self) -> object:
        """Return what the image depends on besides its files, such as the index of a frame or the order of channels."""

    @property
    def origin(self) -> str:
        """The path of its file with symlinks resolved, and the place in it."""
        return os.path.realpath(self.path)

    @abstractmethod
    def stat(self) -> os.stat_result:
        """Return size and times of the file that changed last; an OSError if one is missing."""

    @abstractmethod
    def read(self) -> np.ndarray:
        """Return the pixels (H, W, C), uint8 or uint16."""

    def size(self) -> tuple[int, int] | None:
        """Return height and width by the headers of the files; None: they are known once the image is read."""
        return None

    def read_peaks(self, pixels: np.ndarray | None = None) -> tuple[int, ...]:
        """Return the highest stored level of each channel if the range of 16-bit levels is unknown, else nothing.

        Args:
            pixels: what `read` returns, if it was called.
        """
        return ()


ImageSource = Path | VirtualImage  # a path: an RGB file


def has_own_file(source: ImageSource) -> bool:
    """Return whether the files of an image hold no other image, unlike those of a video."""
    return isinstance(source, Path) or source.is_file


def source_origin(source: ImageSource) -> str:
    """Return the path of an image with symlinks resolved, and the place in it if it is one of several images there."""
    return os.path.realpath(source) if isinstance(source, Path) else source.origin


def first_file(source: ImageSource) -> Path:
    """Return the file that names an image."""
    return source if isinstance(source, Path) else source.path


def source_files(source: ImageSource) -> list[Path]:
    """Return all files that an image is read from.

    Raises:
        UserError: one of several is missing.
    """
    return [source] if isinstance(source, Path) else source.paths


def reading_rule(source: ImageSource) -> object:
    """Return what an image depends on besides its files, see `VirtualImage.rule`; None for an RGB file."""
    return None if isinstance(source, Path) else source.rule


def read_source(source: ImageSource) -> np.ndarray:
    """Return an image as (H, W, C), uint8 RGB or in its format.

    Raises:
        UserError: it cannot be read.
    """
    return read_image(source) if isinstance(source, Path) else source.read()


def read_peaks(source: ImageSource, pixels: np.ndarray | None = None) -> tuple[int, ...]:
    """Return the highest stored level of each channel of an image of 16 bits whose range is not declared.

    It is 0 for channels of 8 bits; empty for other images.

    Args:
        source: the image.
        pixels: what `read_source` returns, if it was read.

    Raises:
        UserError: see `read_source`.
    """
    if not isinstance(source, Path):
        return source.read_peaks(pixels)
    # `read_source` has reduced its depth
    return find_peaks(read_levels(source, None)[..., :3]) if is_deep(source) else ()


def read_valid_pixels(source: ImageSource) -> np.ndarray | None:
    """Return which pixels (H, W) the internal masks of an image's TIFF files mark as valid; None without masks.

    Raises:
        UserError: a file is missing, truncated or no image.
    """
    files = source_files(source) if has_own_file(source) else []
    found = [read_valid(file) for file in files if file.suffix.lower() in TIFF_SUFFIXES]
    masks = [valid for valid in found if valid is not None]
    return np.logical_and.reduce(masks) if masks else None


class VirtualMask(ABC):
    """Base class of masks that are no file of their own, such as shapes of an annotation file or a page of a TIFF."""

    path: Path  # the first or only file
    stated_size: tuple[int, int] | None = None  # height and width, if they are known without reading
    has_class_ids: bool = False  # whether `read` returns class IDs and not the numbers of a file

    def stat(self) -> os.stat_result:
        """Return the file's size and times."""
        return self.path.stat()

    @abstractmethod
    def read(self) -> np.ndarray:
        """Return the mask (H, W), or its layers (K, H, W), uint8."""

    @abstractmethod
    def digest(self) -> str:
        """Return a text that differs if the mask differs, apart from the state of its file."""


MaskSource = Path | VirtualMask


class ObjectSource(VirtualMask):
    """Base class of where the objects of an image come from; `read` returns them as `ObjectMap` (N, H, W) int32."""

    count: int | None = None  # objects that the files list, some of which may have no pixels; None: they list none


def mask_file(mask: MaskSource) -> Path:
    """Return the file that contains a mask, or its first layer."""
    return mask if isinstance(mask, Path) else mask.path


def stated_size(mask: MaskSource) -> tuple[int, int] | None:
    """Return the height and width of a mask if they are known without reading it; None for mask files."""
    return None if isinstance(mask, Path) else mask.stated_size


def mask_key(mask: MaskSource) -> str:
    """Return a text that identifies a mask, apart from the state of its file."""
    suffix = "" if isinstance(mask, Path) else f"#{mask.digest()}"
    return f"{os.path.abspath(mask_file(mask))}{suffix}"


@dataclass(frozen=True)
class MaskPage(VirtualMask):
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

    def read(self) -> np.ndarray:
        """Return the stored numbers, see `read_ids_of_page`."""
        return read_ids_of_page(self.path, self.index, self.count)

    def digest(self) -> str:
        """Return a text that differs for each page."""
        return f"{self.index}/{self.count}"


@dataclass(frozen=True)
class Layers(VirtualMask):
    """Mask of an image with a layer for each class, so that classes may overlap.

    Args:
        sources: file, page or other mask of each class, in id order; None for a class that the image does not show.
        read_layer: returns a source as (H, W) uint8: 1 where the class is, 0, or ignore_index.
    """

    sources: Sequence[MaskSource | None]
    read_layer: Callable[[Any], np.ndarray]
    has_class_ids = True

    def __str__(self) -> str:
        files = (source.path if isinstance(source, MaskPage) else source for source in self.present_sources)
        return ", ".join(dict.fromkeys(map(str, files)))

    @property
    def present_sources(self) -> list[MaskSource]:
        """Return the sources of the classes that have one."""
        return [source for source in self.sources if source is not None]

    @property
    def path(self) -> Path:  # type: ignore[override]
        """Return the file of the first layer."""
        return mask_file(self.present_sources[0])

    @property
    def stated_size(self) -> tuple[int, int] | None:  # type: ignore[override]
        """Return that of the first layer."""
        return stated_size(self.present_sources[0])

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
