"""A folder of frames read as a video is."""

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np

from dinoseg.data.clips.videos import picture_files
from dinoseg.utils.errors import UserError
from dinoseg.utils.images import IMAGE_SUFFIXES, read_image, read_size

_RATE = Fraction(25)  # a folder does not say


class FolderReader:
    """The pictures of a folder as the frames (H, W, 3) uint8 RGB of a video, in the order in which they are counted.

    `size` is (H, W), the same for all; `count` is their number.

    Raises:
        UserError: there is no picture, two have one name, their sizes differ; while reading: a broken picture.
    """

    rate = _RATE
    fps = float(_RATE)
    traits = None  # nothing but frames

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        files = picture_files(self.path)
        if not files:
            raise UserError(
                f"The folder {path} holds no frame directly. Give one of pictures ({' '.join(IMAGE_SUFFIXES)}), or a "
                "video file."
            )
        self._names = list(files)
        self._files = list(files.values())
        self._positions = {name: position for position, name in enumerate(self._names)}
        self.count = len(files)
        self.size = self._common_size()

    def frame_name(self, position: int) -> str:
        """Return a frame's name: its file's, without the suffix."""
        return self._names[position]

    def position(self, name: str) -> int | None:
        """Return which frame has a name; None where there is none."""
        return self._positions.get(name)

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yield each frame."""
        return (read_image(self.path / file) for file in self._files)

    def timed(self) -> Iterator[tuple[np.ndarray, None]]:
        """Yield each frame, and that nothing is known of when it is shown."""
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
