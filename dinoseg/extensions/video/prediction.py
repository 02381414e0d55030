"""Frame-by-frame reader of video files."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from dinoseg.extensions.video.decoder import MAX_PIXELS, REMEDY, Decoder
from dinoseg.utils.errors import UserError

_SHORTEST_TICK = Fraction(1, 2**19)  # seconds; an mp4 frame may last 2**29 of them, about 17 minutes
_RATE = Fraction(25)  # if the file states no rate, or an implausible one


@dataclass(frozen=True)
class VideoTraits:
    """Properties of a video besides its frames and rate, to be copied to a video made from its frames.

    Args:
        tick: unit of timestamps in seconds; all timestamps are multiples of it.
        aspect: pixel aspect ratio, width by height.
        colours: primaries, transfer and matrix, numbered as in H.273.
    """

    tick: Fraction
    aspect: Fraction
    colours: tuple[int, int, int]


class VideoReader:
    """Frames of a video as (H, W, 3) uint8 RGB, rotated upright by the file's rotation tag.

    `size` is (H, W) after rotation; `fps` is 25 if the file states no rate. `count` is the frame count in the file's
    header (0 = unknown), `frames_read` the number of frames read so far. Interlaced frames are returned as stored.

    Args:
        path: the file.
        max_pixels: maximum number of pixels of a frame.

    Raises:
        UserError: the file cannot be opened or holds no frame, or a frame has more pixels than `max_pixels`; while
            reading: it ends early, or its frame size changes.
    """

    def __init__(self, path: str | Path, *, max_pixels: int = MAX_PIXELS) -> None:
        self.path = Path(path)
        self.frames_read = 0
        try:
            self._decoder = Decoder(path, max_pixels=max_pixels)
        except OSError as error:
            raise UserError(f"Cannot read {path} as a video ({error.strerror}). Check the path.") from None
        self._waiting = self._decoder.advance()  # whether a decoded frame was not yielded yet
        if not self._waiting:
            self.close()
            raise self._decoder.unreadable("it holds none")
        self.size: tuple[int, int] = self._decoder.image().shape[:2]
        known = 0 < self._decoder.rate <= 1000
        self.rate = self._decoder.rate if known else _RATE
        self.fps = float(self.rate)
        self._first = (self._decoder.time or 0) - self._decoder.start
        self.traits = VideoTraits(
            _common_tick(self.rate, self._decoder.time_base),
            self._decoder.pixel_aspect,
            self._decoder.colour_tags,
        )
        self.count = self._decoder.declared_frames

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yield each frame once; a second iteration continues where the first stopped."""
        return (frame for frame, _ in self.timed_frames())

    def timed_frames(self) -> Iterator[tuple[np.ndarray, Fraction | None]]:
        """Yield each frame with its timestamp in seconds from the file's start; None if the file states no timestamp.

        Timestamps are exact multiples of `traits.tick`. If only rounding to the file's clock makes them uneven, they
        are corrected to the constant rate.
        """
        while self._waiting or self._decoder.advance():
            self._waiting = False
            frame = self._decoder.rgb_image()
            time = self._timestamp()
            if frame.shape[:2] != self.size:
                raise UserError(
                    f"{self.path} changes its frame size from {self.size} to {frame.shape[:2]} (H, W) after "
                    f"{self.frames_read} frames. Cut it there, or re-encode it at one size."
                )
            self.frames_read += 1
            yield frame, time
        if self._decoder.is_truncated():
            raise UserError(f"{self.path} ends early: {self.frames_read} of {self.count} frames read. {REMEDY}")

    def frame_name(self, position: int) -> str:
        """Return the name of the result files of a frame, counted from 0."""
        return f"{position:09d}"

    def position(self, name: str) -> int | None:
        """Return the frame index that a name states, with or without leading zeros; None if it is no valid index."""
        known = name.isascii() and name.isdigit()
        # without a counter in the header, the count may be one too low
        return int(name) if known and (self.count == 0 or int(name) <= self.count) else None

    def close(self) -> None:
        """Close the file."""
        self._decoder.close()

    def __enter__(self) -> "VideoReader":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _timestamp(self) -> Fraction | None:
        if self._decoder.time is None:
            return None
        time = self._decoder.time - self._decoder.start
        even = self._first + round((time - self._first) * self.rate) / self.rate
        return even if abs(time - even) <= self._decoder.time_base else time


def _common_tick(rate: Fraction, time_base: Fraction) -> Fraction:
    """Return a common divisor of a frame's duration and the clock's tick, or the tick if the divisor is too short.

    Matroska's clock counts milliseconds, and a frame at 30 fps is no whole number of them.
    """
    common = Fraction(1, math.lcm(rate.numerator, time_base.denominator))
    return common if common >= _SHORTEST_TICK else time_base
