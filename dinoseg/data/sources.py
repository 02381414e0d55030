"""Where an image of a dataset is read from: a file, a frame of a video, or files of any channels; imports no torch."""

import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dinoseg.core.channels import ChannelFiles
from dinoseg.utils.images import TIFF_SUFFIXES, is_deep, read_image, read_valid
from dinoseg.utils.levels import find_peaks, read_levels


@dataclass(frozen=True)
class VideoFrame:
    """Frame `index` of a video file, counted from 0 in decoding order from the start.

    Args:
        path: the video.
        index: index of the frame.
        cache_dir: folder of the video's frame index; None: each process builds it in memory.
    """

    path: Path
    index: int
    cache_dir: Path | None = field(default=None, compare=False)

    def __str__(self) -> str:
        return f"frame {self.index} of {self.path}"

    @property
    def paths(self) -> list[Path]:
        """Its only file, the video."""
        return [self.path]

    def stat(self) -> os.stat_result:
        """Return the video file's size and times."""
        return self.path.stat()

    def read(self) -> np.ndarray:
        """Return the pixels (H, W, 3), see `video.access.read_frame`."""
        from dinoseg.data.video.access import read_frame  # images need no video index

        return read_frame(self.path, self.index, self.cache_dir)


ImageSource = Path | VideoFrame | ChannelFiles  # an RGB file, a frame of a video, or files of any channels


def source_origin(source: ImageSource) -> str:
    """Return the path of an image with symlinks resolved, and the frame index if it is a video."""
    if isinstance(source, VideoFrame):
        return f"{os.path.realpath(source.path)}:{source.index}"
    return os.path.realpath(first_file(source))


def first_file(source: Path | ChannelFiles) -> Path:
    """Return the file that names an image."""
    return source if isinstance(source, Path) else source.path


def source_files(source: ImageSource) -> list[Path]:
    """Return all files that an image is read from.

    Raises:
        UserError: one of several is missing.
    """
    return [source] if isinstance(source, Path) else source.paths


def reading_rule(source: ImageSource) -> object:
    """Return what an image depends on besides its files: the frame index or the format; None for an RGB file."""
    if isinstance(source, Path):
        return None
    return source.index if isinstance(source, VideoFrame) else source.format


def read_source(source: ImageSource) -> np.ndarray:
    """Return an image as (H, W, C), uint8 RGB or in its format.

    Raises:
        UserError: see `read_image`, `read_frame` and `PixelFormat.read`.
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
    if isinstance(source, Path):  # `read_source` has reduced its depth
        return find_peaks(read_levels(source, None)[..., :3]) if is_deep(source) else ()
    if isinstance(source, VideoFrame) or source.format.value_range is not None:
        return ()
    return find_peaks(read_source(source) if pixels is None else pixels)


def read_valid_pixels(source: ImageSource) -> np.ndarray | None:
    """Return which pixels (H, W) the internal masks of an image's TIFF files mark as valid; None without masks.

    Raises:
        UserError: a file is missing, truncated or no image.
    """
    files = [] if isinstance(source, VideoFrame) else source_files(source)
    found = [read_valid(file) for file in files if file.suffix.lower() in TIFF_SUFFIXES]
    masks = [valid for valid in found if valid is not None]
    return np.logical_and.reduce(masks) if masks else None
