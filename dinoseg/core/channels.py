"""Images of any number of channels: which files they are read from, and how these become levels; imports no torch."""

import math
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dinoseg.core.sources import VirtualImage
from dinoseg.utils.errors import UserError
from dinoseg.utils.images import IMAGE_SUFFIXES, PIXEL_SUFFIXES, read_image
from dinoseg.utils.levels import find_peaks, join_levels, read_levels, read_levels_size
from dinoseg.utils.ranges import Channels, Natural


@dataclass(frozen=True)
class PixelFormat:
    """Format of images: number of channels, and how their files are read.

    Three channels of one file are RGB of 8 bits, as `read_image` returns them, unless one of the other values is given.
    Otherwise, all channels of all files are used at full depth, in the order of the files. The images are uint16 if a
    file has more than 8 bits, else uint8. If there are three or more channels, the first three are the colours, which
    are augmented and shown in figures.

    Args:
        channels: number of channels C.
        files: words in which the paths of an image's files differ, such as `[images, nir]`; that of the first file has
            the first word. The others are found by replacing it in the file name and in the last folder with it, or in
            one of the two; their suffixes may differ. Empty: one file.
        order: indices of the channels to use, in this order; None: all.
        value_range: lowest and highest value of files of more than 8 bits, see `read_levels`; None: that of uint16.

    Raises:
        UserError: the values contradict each other.
    """

    channels: Channels = 3
    files: Sequence[str] = ()
    order: Sequence[Natural] | None = None
    value_range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        for name in ("files", "order", "value_range"):  # tuples, so that it can be hashed
            value = getattr(self, name)
            object.__setattr__(self, name, value if value is None else tuple(value))
        if len(self.files) == 1 or len(set(self.files)) < len(self.files):
            raise UserError(f"files={list(self.files)}: give different words, at least two, such as [images,nir].")
        if self.order is not None and len(self.order) != self.channels:
            raise UserError(
                f"order={list(self.order)} has {len(self.order)} numbers, and data.channels={self.channels}. Give one "
                "for each channel."
            )
        if self.value_range is not None and not 0 < self.value_range[1] - self.value_range[0] < math.inf:
            raise UserError(
                f"value_range={list(self.value_range)}: give finite numbers [lowest, highest] with lowest < highest."
            )

    @property
    def is_rgb(self) -> bool:
        """Return whether images are read as RGB of 8 bits from one file each."""
        return self == _RGB

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Suffixes of its files, in lower case; RGB is not read from arrays."""
        return IMAGE_SUFFIXES if self.is_rgb else PIXEL_SUFFIXES

    def as_dict(self) -> dict[str, Any]:
        """Return the values as JSON stores them; empty for RGB."""
        if self.is_rgb:
            return {}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    def source(self, path: Path) -> "Path | ChannelFiles":
        """Return an image source that is read in this format."""
        return path if self.is_rgb else ChannelFiles(path, self)

    def read(self, path: Path) -> np.ndarray:
        """Return an image as (H, W, C) uint8 or uint16.

        Args:
            path: its first file.

        Raises:
            UserError: a file is missing or unreadable, or they have another number of channels.
        """
        if self.is_rgb:
            return read_image(path)
        files = self.paths(path)
        parts = [read_levels(file, self.value_range) for file in files]
        _check_sizes(files, [(part.shape[0], part.shape[1]) for part in parts])
        pixels = join_levels(parts)
        counts = " + ".join(f"{part.shape[2]}" for part in parts)
        if self.order is not None:
            if max(self.order) >= pixels.shape[2]:
                raise UserError(
                    f"{path} has {counts} channels, and data.pixels.order={list(self.order)}. Give numbers from 0 to "
                    f"{pixels.shape[2] - 1}."
                )
            pixels = pixels[..., self.order]
        if pixels.shape[2] != self.channels:
            raise UserError(
                f"{path} has {counts} channels, and data.channels={self.channels}. Set "
                f"data.channels={pixels.shape[2]}; or set data/pixels=files, and name further files by "
                "data.pixels.files, such as [images,nir], or choose channels by data.pixels.order, such as [0,1,2]."
            )
        return np.ascontiguousarray(pixels)

    def size(self, path: Path) -> tuple[int, int]:
        """Return height and width of an image from the headers of its files.

        Raises:
            UserError: a file is missing or no image, or their sizes differ.
        """
        files = self.paths(path)
        sizes = [read_levels_size(file) for file in files]
        _check_sizes(files, sizes)
        return sizes[0]

    def paths(self, path: Path) -> list[Path]:
        """Return all files of an image, whose first one is `path`.

        Raises:
            UserError: one is missing.
        """
        return [path, *(self._counterpart(path, word) for word in self.files[1:])]

    def _counterpart(self, path: Path, word: str) -> Path:
        pattern = re.compile(rf"(?<![A-Za-z0-9]){re.escape(self.files[0])}(?![A-Za-z0-9])")
        parent = path.absolute().parent
        parts = [*parent.parts]
        places = [number for number, part in enumerate(parts) if pattern.search(part)]
        for number in places[-1:]:
            parts[number] = pattern.sub(lambda _: word, parts[number])
        renamed = pattern.sub(lambda _: word, path.stem)
        folder = Path(*parts)
        # a folder above, or the name, may have the word by chance
        targets = [folder / renamed, parent / renamed, folder / path.stem]
        for target in (target for target in targets if target != parent / path.stem):
            found = [file for suffix in PIXEL_SUFFIXES for file in _find_file(target, suffix)]
            if len(found) > 1:
                raise UserError(f"{path} has two files of `{word}`: {found[0]} and {found[1]}. Keep one of them.")
            if found:
                return found[0]
        raise UserError(
            f"{path} has no file of `{word}`, such as {targets[0]}.*. Add it, or correct "
            f"data.pixels.files=[{','.join(self.files)}]: the path has to hold its first word."
        )


_RGB = PixelFormat()


def check_rgb(pixels: PixelFormat, what: str) -> None:
    """Refuse images that are not RGB, for what reads RGB only.

    Raises:
        UserError: they have another number of channels; `what` begins the message.
    """
    if pixels.channels != 3:
        raise UserError(
            f"{what[0].upper()}{what[1:]} has 3 channels (RGB), and data.channels={pixels.channels}. Use images with "
            "mode=train, eval or predict; or train a model with data.channels=3."
        )


@dataclass(frozen=True)
class ChannelFiles(VirtualImage):
    """Image that is read in a format, as an image source of a dataset.

    Args:
        path: its first file.
        format: how it is read.
    """

    path: Path
    format: PixelFormat

    def __str__(self) -> str:
        return str(self.path)

    @property
    def paths(self) -> list[Path]:
        """All its files; raises a UserError if one is missing."""
        return self.format.paths(self.path)

    def stat(self) -> os.stat_result:
        """Return size and times of the file that changed last.

        Raises:
            OSError: a file is missing.
        """
        try:
            return max(
                (path.stat() for path in self.paths), key=lambda status: max(status.st_mtime_ns, status.st_ctime_ns)
            )
        except UserError as error:
            raise FileNotFoundError(str(error)) from None

    @property
    def rule(self) -> PixelFormat:
        """The format."""
        return self.format

    def read(self) -> np.ndarray:
        """Return the pixels (H, W, C), see `PixelFormat.read`."""
        return self.format.read(self.path)

    def read_peaks(self, pixels: np.ndarray | None = None) -> tuple[int, ...]:
        """Return the highest level of each channel if the format declares no range; see `VirtualImage`."""
        if self.format.value_range is not None:
            return ()
        return find_peaks(self.read() if pixels is None else pixels)

    def size(self) -> tuple[int, int]:
        """Return height and width, see `PixelFormat.size`."""
        return self.format.size(self.path)


def _find_file(target: Path, suffix: str) -> list[Path]:
    """Return the file with a suffix in lower or upper case; on some file systems, both name one."""
    files = [target.with_name(f"{target.name}{case}") for case in (suffix, suffix.upper())]
    return [file for file in files if file.exists()][:1]


def _check_sizes(files: Sequence[Path], sizes: Sequence[tuple[int, int]]) -> None:
    for file, size in zip(files, sizes, strict=True):
        if size != sizes[0]:
            raise UserError(
                f"{file} is {size[0]} x {size[1]} pixels, and {files[0]} {sizes[0][0]} x {sizes[0][1]} (H x W). All "
                "files of an image need one size: resize them."
            )
