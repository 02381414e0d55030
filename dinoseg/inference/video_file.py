"""Video files read and written frame by frame."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np

from dinoseg.errors import UserError
from dinoseg.storage.files import check_regular

# H.264 plays everywhere, but OpenCV's PyPI wheels have no encoder for it. Their VP9 encoder plays in
# browsers and writes 4 frames/s of 480p on one core, where MPEG-4 Part 2 writes 440: speed wins.
_CODECS = ("avc1", "mp4v")
_COUNTED_SUFFIXES = (".avi", ".mp4", ".mov", ".m4v")  # their headers hold the number of frames
# FFmpeg's own lines on stderr, off; OpenCV reads this when it opens its first video
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")


class VideoReader:
    """Frames of a video as (H, W, 3) uint8 RGB, turned upright by the file's rotation tag.

    `size` is (H, W) after turning, `fps` is 25 where the file does not say, `count` is what the file's
    header says (0 = unknown), `frames_read` how many frames came so far.

    Raises:
        UserError: the file cannot be opened or holds no frame; while reading: it ends early or the size
            of its frames changes.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.frames_read = 0
        if self.path.exists():
            check_regular(self.path)
        with _silence():
            self._capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
            opened, first = self._capture.read() if self._capture.isOpened() else (False, None)
        if not opened or first is None:
            self.close()
            raise UserError(f"Cannot read {path} as a video: 0 frames read. {self._remedy()}")
        self._first: np.ndarray | None = np.asarray(first)
        self.size: tuple[int, int] = (first.shape[0], first.shape[1])
        fps = self._capture.get(cv2.CAP_PROP_FPS)
        self.fps = fps if 0 < fps <= 1000 else 25.0
        self.count = max(0, int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT)))

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yield each frame once; a second iteration goes on where the first stopped."""
        end = 0.0  # seconds
        while (frame := self._next()) is not None:
            if frame.shape[:2] != self.size:
                raise UserError(
                    f"{self.path} changes its frame size from {self.size} to {frame.shape[:2]} (H, W) after "
                    f"{self.frames_read} frames. Cut it there, or re-encode it at one size."
                )
            end = self._capture.get(cv2.CAP_PROP_POS_MSEC) / 1000 + 1 / self.fps
            self.frames_read += 1
            yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
        if self._ended_early(end):
            raise UserError(f"{self.path} ends early: {self.frames_read} of {self.count} frames read. {self._remedy()}")

    def frame_name(self, position: int) -> str:
        """Return what results of a frame, counted from 0, are called."""
        return f"{position:09d}"

    def position(self, name: str) -> int | None:
        """Return which frame a name stands for: its number, however many zeros are in front; None where it is none."""
        known = name.isascii() and name.isdigit()
        # without a counter in the header, the count may be one short
        return int(name) if known and (self.count == 0 or int(name) <= self.count) else None

    def close(self) -> None:
        """Release the file."""
        self._capture.release()

    def __enter__(self) -> "VideoReader":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _next(self) -> np.ndarray | None:
        if self._first is not None:
            frame, self._first = self._first, None
            return frame
        more, frame = self._capture.read()
        return np.asarray(frame) if more else None

    def _ended_early(self, end: float) -> bool:
        if self.frames_read >= self.count - 1:
            return False
        # elsewhere `count` is duration times a frame rate that may be nominal: the time must be short too
        counted = self.path.suffix.lower() in _COUNTED_SUFFIXES
        return counted or end < (self.count - 1.5) / self.fps

    def _remedy(self) -> str:
        return "It is truncated, damaged or no video: replace it, or re-encode it (ffmpeg -i IN OUT.mp4)."


class VideoWriter:
    """Writes RGB frames to an mp4 that appears under its name only when complete.

    H.264 where OpenCV can encode it, else MPEG-4 Part 2. Both need even sides: an odd frame's last row or
    column is repeated once. Leaving the `with` block by an exception leaves no file.

    Raises:
        UserError: no encoder works, or the file came out shorter than what was written (a full disk).
    """

    def __init__(self, path: str | Path, fps: float, size: tuple[int, int]) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.frames_written = 0
        self._size = size
        self._part = self.path.with_name(f".{self.path.stem}.{os.getpid()}.part{self.path.suffix}")
        self._writer, self.codec = self._open(fps)

    def write(self, frame: np.ndarray) -> None:
        """Append one frame (H, W, 3) uint8 RGB."""
        if frame.shape[:2] != self._size:
            raise ValueError(f"A frame {frame.shape[:2]} does not fit a video of {self._size} (H, W).")
        height, width = self._size
        bgr = cv2.cvtColor(frame, cv2.COLOR_RGB2BGR)
        if height % 2 or width % 2:
            bgr = np.pad(bgr, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        with _silence():
            self._writer.write(bgr)
        self.frames_written += 1

    def close(self) -> None:
        """Finish the file, check that it holds every frame, and give it its name."""
        with _silence():
            self._writer.release()
            capture = cv2.VideoCapture(str(self._part), cv2.CAP_FFMPEG)
        stored = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)) if capture.isOpened() else 0
        capture.release()
        if self.frames_written == 0 or stored < self.frames_written:
            self.discard()
            raise UserError(
                f"Cannot write {self.path}: {stored} of {self.frames_written} frames arrived. "
                "Free some disk space, or choose another output folder with hydra.run.dir."
            )
        os.replace(self._part, self.path)

    def discard(self) -> None:
        """Drop what was written."""
        with _silence():
            self._writer.release()
        self._part.unlink(missing_ok=True)

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()

    def _open(self, fps: float) -> tuple[cv2.VideoWriter, str]:
        height, width = (side + side % 2 for side in self._size)
        for codec in _CODECS:
            code = cv2.VideoWriter.fourcc(*codec)
            with _silence():
                writer = cv2.VideoWriter(str(self._part), cv2.CAP_FFMPEG, code, fps, (width, height))
            if writer.isOpened():
                return writer, codec
        self._part.unlink(missing_ok=True)
        raise UserError(
            f"Cannot write {self.path} ({width} x {height}, {fps:g} frames/s): OpenCV opens none of "
            f"{', '.join(_CODECS)}. Check that the folder can be written, or install opencv-python-headless."
        )


@contextmanager
def _silence() -> Iterator[None]:
    """Keep OpenCV from printing what our errors say in one line."""
    level = cv2.utils.logging.getLogLevel()
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    try:
        yield
    finally:
        cv2.utils.logging.setLogLevel(level)
