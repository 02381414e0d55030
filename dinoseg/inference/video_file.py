"""Video files read and written frame by frame: in what any camera wrote, out what any browser plays."""

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import cast

import av
import numpy as np
from av.error import FFmpegError
from av.video.codeccontext import VideoCodecContext
from av.video.reformatter import VideoReformatter

from dinoseg.data.video.decoder import Decoder, rgb
from dinoseg.errors import UserError
from dinoseg.inference.sound import Sound
from dinoseg.storage.atomic import part_of
from dinoseg.storage.files import check_regular

# H.264 plays everywhere; builds of PyAV without x264 have one of the others
# (x264 by its trees of macroblocks gives other bytes for the second video of a process than for the first)
_CODECS = {
    "libx264": {"preset": "veryfast", "crf": "20", "x264-params": "mbtree=0"},
    "libopenh264": {},
    "libvpx-vp9": {"cpu-used": "8"},
}
_COUNTED_SUFFIXES = (".avi", ".mp4", ".mov", ".m4v")  # their headers hold the number of frames
_SHORTEST_TICK = Fraction(1, 2**24)  # seconds; mp4 counts in 32 bits
_RATE = Fraction(25)  # where a file does not say, or talks nonsense


class VideoReader:
    """Frames of a video as (H, W, 3) uint8 RGB, turned upright by the file's rotation tag.

    `size` is (H, W) after turning, `fps` is 25 where the file does not say, `count` is what the file's
    header says (0 = unknown), `frames_read` how many frames came so far. Interlaced frames come as they are stored.

    Args:
        path: the file; with `device` what that calls its source.
        device: FFmpeg's name of what captures; None: a file.

    Raises:
        UserError: the file cannot be opened or holds no frame; while reading: it ends early or the size
            of its frames changes.
    """

    def __init__(self, path: str | Path, *, device: str | None = None) -> None:
        self.path = Path(path)
        self.frames_read = 0
        if device is None and self.path.exists():
            check_regular(self.path)
        try:
            self._decoder = Decoder(path, device=device)
        except (OSError, UserError):
            raise self._unreadable() from None
        self._waiting = self._decoder.advance()  # whether a frame is decoded that was not yielded
        if not self._waiting:
            self.close()
            raise self._unreadable()
        self.size: tuple[int, int] = self._decoder.image().shape[:2]
        known = 0 < self._decoder.rate <= 1000
        self.rate = self._decoder.rate if known else _RATE
        self.fps = float(self.rate)
        self._first = (self._decoder.time or 0) - self._decoder.start
        self.tick = _common_tick(self.rate, self._decoder.time_base)
        self.count = self._decoder.promised

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yield each frame once; a second iteration goes on where the first stopped."""
        return (frame for frame, _ in self.timed())

    def timed(self) -> Iterator[tuple[np.ndarray, Fraction | None]]:
        """Yield each frame as `__iter__` does, and when it is shown, in seconds from the file's start, if it says.

        Times are multiples of `tick`: exact, and of a constant rate where only the file's own clock makes it uneven.
        """
        end = Fraction(0)  # seconds from the file's start
        while self._waiting or self._decoder.advance():
            self._waiting = False
            frame, shown = self._decoder.image(), self._shown()
            if frame.shape[:2] != self.size:
                raise UserError(
                    f"{self.path} changes its frame size from {self.size} to {frame.shape[:2]} (H, W) after "
                    f"{self.frames_read} frames. Cut it there, or re-encode it at one size."
                )
            end = (end if shown is None else shown) + 1 / self.rate
            self.frames_read += 1
            yield rgb(frame), shown
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
        self._decoder.close()

    def __enter__(self) -> "VideoReader":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _shown(self) -> Fraction | None:
        if self._decoder.time is None:
            return None
        time = self._decoder.time - self._decoder.start
        even = self._first + round((time - self._first) * self.rate) / self.rate
        return even if abs(time - even) <= self._decoder.time_base else time

    def _ended_early(self, end: Fraction) -> bool:
        if self.frames_read >= self.count - 1:
            return False
        # elsewhere `count` is duration times a frame rate that may be nominal: the time must be short too
        counted = self.path.suffix.lower() in _COUNTED_SUFFIXES
        return counted or end < (self.count - Fraction(3, 2)) / self.rate

    def _unreadable(self) -> UserError:
        return UserError(f"Cannot read {self.path} as a video: 0 frames read. {self._remedy()}")

    def _remedy(self) -> str:
        return "It is truncated, damaged or no video: replace it, or re-encode it (ffmpeg -i IN OUT.mp4)."


def _common_tick(rate: Fraction, time_base: Fraction) -> Fraction:
    """Return a length of time of which both a frame and a tick of the file's clock are multiples, if none is too short.

    Matroska counts milliseconds, of which no frame of 30 a second is a multiple.
    """
    common = Fraction(1, math.lcm(rate.numerator, time_base.denominator))
    return common if common >= _SHORTEST_TICK else time_base


class VideoWriter:
    """Writes RGB frames to an mp4 that plays in browsers, and appears under its name only when complete.

    H.264 (yuv420p, its index in front). That needs even sides: an odd frame's last row or column is repeated once.
    Leaving the `with` block by an exception leaves no file.

    Args:
        path: the file.
        rate: frames per second, for frames without a time of their own.
        size: (H, W) of the frames.
        tick: what times are whole multiples of, in seconds; None: one frame.
        like: the video whose sound and colour tags are taken over; None: neither.
        cut: whether the sound ends with the pictures, too.

    Raises:
        UserError: no encoder works, or the file came out shorter than what was written (a full disk).
    """

    def __init__(
        self,
        path: str | Path,
        rate: float | Fraction,
        size: tuple[int, int],
        *,
        tick: Fraction | None = None,
        like: Path | None = None,
        cut: bool = False,
    ) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.frames_written = 0
        self._size, self._cut = size, cut
        rate = rate if isinstance(rate, Fraction) else Fraction(rate).limit_denominator(1001)
        self._tick = tick or 1 / rate
        self._step = max(1, round(1 / rate / self._tick))  # ticks of a frame without a time
        self._last = -self._step  # when the frame before was shown, in ticks
        self._reformatter = VideoReformatter()
        self._part = part_of(self.path)
        codec = next((name for name in _CODECS if name in av.codecs_available), None)
        if codec is None:
            raise UserError(
                f"Cannot write {path}: PyAV has none of the encoders {', '.join(_CODECS)}. Install av anew."
            )
        try:
            self._container = av.open(f"file:{self._part}", "w", format="mp4", options={"movflags": "+faststart"})
            self._stream = cast(av.VideoStream, self._container.add_stream(codec, rate=rate, options=_CODECS[codec]))
            self._describe(self._stream.codec_context, like)
            self._sound = Sound(like, self._container)
        except FFmpegError as error:
            self._part.unlink(missing_ok=True)
            raise self._unwritable(str(error.strerror)) from error

    def write(self, frame: np.ndarray, time: Fraction | None = None) -> None:
        """Append one frame (H, W, 3) uint8 RGB, shown `time` seconds after the start; None: a frame after the last one.

        Times that do not rise are moved by as little as they must.
        """
        if frame.shape[:2] != self._size:
            raise ValueError(f"A frame {frame.shape[:2]} does not fit a video of {self._size} (H, W).")
        height, width = self._size
        if height % 2 or width % 2:
            frame = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
        picture = self._reformatter.reformat(picture, format="yuv420p")
        self._last = self._last + self._step if time is None else max(self._last + 1, round(time / self._tick))
        picture.pts, picture.time_base, picture.duration = self._last, self._tick, self._step
        try:
            self._container.mux(self._stream.encode(picture))
            self._sound.write_until((self._last + self._step) * self._tick)
        except FFmpegError as error:
            raise self._unwritable(str(error.strerror)) from error
        self.frames_written += 1

    def close(self) -> None:
        """Finish the file, check that it holds every frame, and give it its name."""
        reason = ""
        try:
            self._container.mux(self._stream.encode(None))
            if not self._cut:
                self._sound.write_until(None)
            self._container.close()
        except FFmpegError as error:
            reason = f"{error.strerror}; "
        stored = self._stored()
        if reason or self.frames_written == 0 or stored < self.frames_written:
            self.discard()
            raise self._unwritable(f"{reason}{stored} of {self.frames_written} frames arrived")
        self._sound.close()
        os.replace(self._part, self.path)

    def discard(self) -> None:
        """Drop what was written."""
        self._sound.close()
        with suppress(FFmpegError):
            self._container.close()
        self._part.unlink(missing_ok=True)

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()

    def _describe(self, codec: VideoCodecContext, like: Path | None) -> None:
        height, width = (side + side % 2 for side in self._size)
        codec.width, codec.height, codec.pix_fmt, codec.time_base = width, height, "yuv420p", self._tick
        if like is not None:
            # RGB is made and unmade by the same matrix, whatever the tags say: with them it looks as the source does
            with Decoder(like) as source:
                codec.color_primaries, codec.color_trc, codec.colorspace = source.colour_tags

    def _stored(self) -> int:
        try:
            with av.open(f"file:{self._part}") as written:
                return written.streams.video[0].frames
        except (FFmpegError, IndexError):
            return 0

    def _unwritable(self, reason: str) -> UserError:
        return UserError(
            f"Cannot write {self.path}: {reason}. Free some disk space, or choose another output folder with "
            "hydra.run.dir."
        )
