"""User-supplied inputs of prediction: image files, videos, folders of frames and glob patterns."""

import logging
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

from dinoseg.data.clips.videos import picture_files
from dinoseg.data.video.length import VIDEO_SUFFIXES
from dinoseg.inference.video_file import VideoReader
from dinoseg.utils.errors import UserError
from dinoseg.utils.files import entries, find_files, is_pattern
from dinoseg.utils.images import IMAGE_SUFFIXES, UNREAD_SUFFIXES, read_image, read_size
from dinoseg.utils.wording import count_of, join_names

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


log = logging.getLogger(__name__)
FrameReader = VideoReader | FolderReader  # both yield frames in order, each with a name


def list_inputs(source: str, key: str = "input", suffixes: Sequence[str] = IMAGE_SUFFIXES) -> list[Path]:
    """Return the images and videos that a file, folder or glob pattern names, in natural order (x2 before x10).

    In folders and among pattern matches, hidden files and files of other types are skipped. Subfolders are not
    searched. `key` is the config key that messages name, `suffixes` are those of images.

    Raises:
        UserError: nothing is there, it cannot be read, or it contains no image or video.
    """
    kinds = (*suffixes, *VIDEO_SUFFIXES)
    accepted = (
        f"Accepted are an image ({' '.join(suffixes)}), a video ({' '.join(VIDEO_SUFFIXES)}), a folder of them, or a "
        "quoted pattern such as 'frames/**/*.png'."
    )
    path = Path(source).expanduser()
    if path.is_dir():
        nothing = f"The folder {path} holds no image or video directly."
    elif path.exists():
        if path.suffix.lower() not in kinds:
            raise UserError(f"{path} is of an unknown kind ({path.suffix or 'no suffix'}). {accepted}")
        return [path]
    elif is_pattern(source):
        nothing = f"The pattern {source} matches no image or video."
    else:
        raise UserError(f"File or folder not found: {key}={source}. Check the path. {accepted}")
    media, unread = find_files(source, kinds), find_files(source, UNREAD_SUFFIXES)
    left_out = f"{count_of(unread, 'file')} of unsupported formats: {join_names([path.name for path in unread])}."
    if not media:
        raise UserError(f"{nothing} {accepted}{f' There are {left_out} Convert them to PNG.' if unread else ''}")
    if unread:
        log.warning("%s=%s: left out %s Convert them to PNG.", key, source, left_out)
    if path.is_dir() and (below := [folder.name for folder in entries(path) if _has_media(folder, kinds)]):
        what = f"images or videos in {count_of(below, 'subfolder')} ({join_names(below)})"
        log.warning("%s=%s: left out %s. Give %s='%s/**/*' to include them.", key, source, what, key, path)
    return media


def _has_media(path: Path, kinds: Sequence[str]) -> bool:
    """Return whether a path is a folder with an image or a video in it or below it."""
    return path.is_dir() and any(each.suffix.lower() in kinds for each in path.rglob("*"))


def is_video(path: Path) -> bool:
    """Return whether the file has a video suffix."""
    return path.suffix.lower() in VIDEO_SUFFIXES


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
    wrong = (
        f"input={source} is neither a video nor a folder" if path.exists() else f"File or folder not found: {source}"
    )
    raise UserError(
        f"{wrong}. Give a video ({' '.join(VIDEO_SUFFIXES)}) or a folder of its frames ({' '.join(IMAGE_SUFFIXES)}), "
        "one at a time."
    )
