"""What a user may give as `input`: pictures and videos of one's own, found and opened."""

import logging
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np

from dinoseg.data.clips.videos import picture_files
from dinoseg.data.video.length import VIDEO_SUFFIXES
from dinoseg.inference.video_file import VideoReader
from dinoseg.utils.errors import UserError
from dinoseg.utils.files import found, is_pattern
from dinoseg.utils.images import IMAGE_SUFFIXES, UNREAD_SUFFIXES, read_image, read_size
from dinoseg.utils.wording import count_of, listed

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


log = logging.getLogger(__name__)
FrameReader = VideoReader | FolderReader  # frames one after the other, each with a name
_CAMERAS = {"linux": ("v4l2", "/dev/video{}"), "darwin": ("avfoundation", "{}")}  # FFmpeg's names
_KINDS = (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES)
_ACCEPTED = (
    f"Accepted are an image ({' '.join(IMAGE_SUFFIXES)}), a video ({' '.join(VIDEO_SUFFIXES)}), a folder of "
    "them, or a quoted pattern such as 'frames/**/*.png'."
)


def list_inputs(source: str, key: str = "input") -> list[Path]:
    """Return the images and videos that an image, video, folder or glob pattern stands for: x2 before x10.

    In a folder and among a pattern's matches, files of other kinds and hidden files are passed over;
    subfolders are not searched. `key` is what messages call it.

    Raises:
        UserError: nothing is there, it cannot be read, or none of it is an image or a video.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        nothing = f"The folder {path} holds no image or video directly."
    elif path.exists():
        if path.suffix.lower() not in _KINDS:
            raise UserError(f"{path} is of an unknown kind ({path.suffix or 'no suffix'}). {_ACCEPTED}")
        return [path]
    elif is_pattern(source):
        nothing = f"The pattern {source} matches no image or video."
    else:
        raise UserError(f"No such file or folder: {key}={source}. Check the path. {_ACCEPTED}")
    media, unread = found(source, _KINDS), found(source, UNREAD_SUFFIXES)
    left_out = f"{count_of(unread, 'file')} of kinds that are not read: {listed([path.name for path in unread])}."
    if not media:
        raise UserError(f"{nothing} {_ACCEPTED}{f' There are {left_out} Convert them to PNG.' if unread else ''}")
    if unread:
        log.warning("%s=%s: left out are %s Convert them to PNG.", key, source, left_out)
    return media


def is_video(path: Path) -> bool:
    """Say whether the file's suffix is one of a video."""
    return path.suffix.lower() in VIDEO_SUFFIXES


def camera_of(source: str | int) -> int | None:
    """Return the number of the camera that an input names; None for a path, which may be a number, too."""
    number = isinstance(source, int) or source.isdecimal()
    return int(source) if number and not Path(str(source)).exists() else None


def open_camera(number: int) -> VideoReader:
    """Return the frames of a camera, which do not end by themselves.

    Raises:
        UserError: there is none of that number, or this system's cameras have none.
    """
    if sys.platform not in _CAMERAS:
        raise UserError(f"input={number}: cameras are read on Linux and macOS. Record a video, and give its file.")
    device, name = _CAMERAS[sys.platform]
    try:
        return VideoReader(name.format(number), device=device)
    except UserError:
        raise UserError(
            f"input={number}: no camera answers as {name.format(number)}. Check its number, that it is plugged in, "
            "that no other program has it, and that your user may read it."
        ) from None


def open_frames(source: str) -> FrameReader:
    """Return the frames of a video file or of a folder of pictures, one after the other.

    Raises:
        UserError: there is nothing of that name, it is neither, or it holds no frame.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return FolderReader(path)
    if path.is_file() and is_video(path):
        return VideoReader(path)
    wrong = f"input={source} is neither a video nor a folder" if path.exists() else f"No such file or folder: {source}"
    raise UserError(
        f"{wrong}. Give a video ({' '.join(VIDEO_SUFFIXES)}) or a folder of its frames ({' '.join(IMAGE_SUFFIXES)}), "
        "one at a time."
    )
