"""Frames of a video file or of a folder of images, in order and with a name each."""

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np

from dinoseg.extensions.video.length import VIDEO_SUFFIXES, is_video
from dinoseg.extensions.video.pictures import picture_files
from dinoseg.extensions.video.prediction import VideoReader
from dinoseg.utils.errors import UserError
from dinoseg.utils.files import check_exists
from dinoseg.utils.images import IMAGE_SUFFIXES, read_image, read_size

_RATE = Fraction(25)  # frames per second assumed for a folder


class FolderReader:
    """Images of a folder as video frames (H, W, 3) uint8 RGB, in natural order of their names.

    `size` is (H, W) of all frames, `count` their number.

    Raises:
        UserError: the folder holds no image, two images share a stem, or sizes differ; while reading: an image is
            damaged.
    """

    rate = _RATE
    fps = float(_RATE)
    traits = None  # no tick or colour tags

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        files = picture_files(self.path)
        if not files:
            raise UserError(
                f"The folder {path} holds no frame directly. Give a folder of images ({' '.join(IMAGE_SUFFIXES)}), or "
                "a video file."
            )
        self._names = list(files)
        self._files = list(files.values())
        self._positions = {name: position for position, name in enumerate(self._names)}
        self.count = len(files)
        self.size = self._common_size()

    def frame_name(self, position: int) -> str:
        """Return a frame's name: its file name without suffix."""
        return self._names[position]

    def position(self, name: str) -> int | None:
        """Return the index of the frame with this name; None if there is none."""
        return self._positions.get(name)

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yield each frame."""
        return (read_image(self.path / file) for file in self._files)

    def timed_frames(self) -> Iterator[tuple[np.ndarray, None]]:
        """Yield each frame with None as its timestamp."""
        return ((frame, None) for frame in self)

    def __enter__(self) -> "FolderReader":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def _common_size(self) -> tuple[int, int]:
        size = read_size(self.path / self._files[0])
        for file in self._files[1:]:
            if (other := read_size(self.path / file)) != size:
                raise UserError(
                    f"{self.path / file} is {other[0]} x {other[1]} pixels, and {self._files[0]} {size[0]} x {size[1]} "
                    "(H x W). All frames of a folder need one size: resize them, or give a folder of one size."
                )
        return size


FrameReader = VideoReader | FolderReader  # both yield frames in order, each with a name


def open_frames(source: str) -> FrameReader:
    """Open a video file or a folder of images as a sequence of frames.

    Raises:
        UserError: the path does not exist, is neither of the two, or holds no frame.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return FolderReader(path)
    if path.is_file() and is_video(path):
        return VideoReader(path)
    remedy = (
        f"Give a video ({' '.join(VIDEO_SUFFIXES)}) or a folder of its frames ({' '.join(IMAGE_SUFFIXES)}), one at a "
        "time."
    )
    check_exists(source, "input", remedy)
    raise UserError(f"input={source} is neither a video nor a folder. {remedy}")
