"""A video decoded frame after frame, upright, each with its time: the one place that decodes."""

import re
import struct
from collections.abc import Generator, Iterator, Mapping
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import av
import cv2
import numpy as np
from av.buffer import Buffer
from av.error import FFmpegError
from av.stream import Disposition
from av.video.reformatter import Interpolation, VideoReformatter

from dinoseg.utils.errors import UserError
from dinoseg.utils.files import check_regular

VERSION = av.__version__  # of what decodes: another may give other pixels
# FFmpeg's names: what holds pictures itself, unlike playlists, which in the guise of a video would lead to other files
_FORMATS = (
    "mov,matroska,avi,mpegts,mpeg,mpegvideo,asf,flv,ogg,mxf,nut,dv,ivf,gif,apng,h264,hevc,m4v,mjpeg,yuv4mpegpipe,obu"
)
_COVERS = Disposition.attached_pic | Disposition.timed_thumbnails
_CLOCK = re.compile(r"(\d{1,4}):(\d\d):(\d\d(?:\.\d+)?)")
MOST_PIXELS = 2**27  # of a frame; 16384 x 8192, more than any camera has: a file of a kilobyte may claim what it likes
_MOST_SILENT = 10_000  # packets without a frame: minutes that lack the key frame to begin with
REMEDY = "It is truncated, damaged or no video: replace it, or re-encode it (ffmpeg -i IN OUT.mp4)."


class FrameTooLarge(UserError):
    """A video whose frames have more pixels than are read."""


class Decoder:
    """An open video. `advance` decodes the next frame, of which the other methods speak.

    Packets that are damaged are passed over, and a file that is cut off ends: whoever counts finds out. `rate` is what
    the container says, 0 where it says nothing; `promised` how many frames it says there are, 0 likewise: that may be
    one or two off, and is its length times its rate where no frames are counted. Its clock begins at `start` seconds
    and ticks every `time_base`.

    Args:
        path: the file, which no protocol but that of files opens; or, with `device`, what that calls its source.
        threads: of the codec; 0: as it likes. One alone neither outlives a fork badly nor fights other processes.
        device: FFmpeg's name of what captures, such as v4l2; None: a file.
        max_pixels: of a frame.

    Raises:
        FrameTooLarge: its frames have more pixels, by its header.
        UserError: it is no file or no video; from `advance`: far more packets than frames.
        OSError: nothing is there, or it may not be looked at.
    """

    def __init__(
        self, path: str | Path, *, threads: int = 0, device: str | None = None, max_pixels: int = MOST_PIXELS
    ) -> None:
        if device is None:
            check_regular(path)
        self.path = path
        only_files = {"protocol_whitelist": "file", "format_whitelist": _FORMATS}
        try:
            self._container = av.open(
                str(path) if device else f"file:{path}", format=device, options={} if device else only_files
            )
        except FFmpegError as error:
            raise self.unreadable(str(error.strerror)) from None
        try:
            self._stream = self._pictures(max_pixels)
        except UserError:
            self._container.close()
            raise
        self._stream.thread_type = "AUTO" if threads == 0 else "NONE"
        self._stream.codec_context.thread_count = threads
        self._reformatter, self._threads = VideoReformatter(), threads
        self._frame: av.VideoFrame
        self._frames = self._decoded()
        self.rate = self._stream.guessed_rate or Fraction(0)
        self.time_base = self._stream.time_base or Fraction(1, 1000)
        self.start = Fraction(self._container.start_time or 0, av.time_base)
        self.promised = self._stream.frames or int(self._seconds() * self.fps + 0.5)

    @property
    def fps(self) -> float:
        """Frames per second, as the container says; 0 where it says nothing."""
        return float(self.rate)

    @property
    def pixel_aspect(self) -> Fraction:
        """Width of a pixel by its height, of the frame as it is turned; 1 where the file does not say."""
        aspect = self._stream.sample_aspect_ratio or Fraction(1)
        return 1 / aspect if _orientation(self._frame)[0] else aspect

    @property
    def colour_tags(self) -> tuple[int, int, int]:
        """The file's colour primaries, transfer and matrix, as numbers of H.273."""
        codec = self._stream.codec_context
        return codec.color_primaries, codec.color_trc, codec.colorspace

    def advance(self) -> bool:
        """Decode the next frame; return whether there is one."""
        frame = next(self._frames, None)
        if frame is not None:
            self._frame = frame
        return frame is not None

    @property
    def time(self) -> Fraction | None:
        """When the frame is shown, in seconds on the file's own clock; None where the file does not say."""
        return None if self._frame.pts is None else self._frame.pts * self.time_base

    def image(self) -> np.ndarray:
        """Return the frame's pixels (H, W, 3) uint8 BGR, turned and mirrored as the file says, to the nearest quarter.

        Raises:
            UserError: it cannot be converted.
        """
        return self._converted("bgr24")

    def rgb_image(self) -> np.ndarray:
        """Return what `rgb` makes of `image`, to the bit, in less time."""
        deep = any(component.bits > 8 for component in self._frame.format.components)
        return rgb(self.image()) if deep else self._converted("rgb24")  # what is deep is rounded in the order's own way

    def packets(self) -> Iterator[av.Packet]:
        """Yield the packets of all streams as they are stored; nothing can be decoded afterwards."""
        with suppress(FFmpegError):  # cut off
            yield from self._container.demux()

    def jump(self, time: float) -> None:
        """Let the next frame be one at this time in milliseconds or before, as near as the container can tell.

        Raises:
            OSError: it cannot jump.
        """
        self._container.seek(round(time / 1000 / self.time_base), stream=self._stream)
        self._frames = self._decoded()

    def close(self) -> None:
        """Release the file."""
        self._frames.close()
        self._container.close()

    def __enter__(self) -> "Decoder":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _converted(self, order: str) -> np.ndarray:
        try:
            # bicubic, as OpenCV's reader asks for: what was read before is read again to the bit
            converted = self._reformatter.reformat(
                self._frame, format=order, interpolation=Interpolation.BICUBIC, threads=self._threads
            )
        except (FFmpegError, ValueError) as error:
            raise UserError(f"A frame of {self.path} cannot be converted to RGB ({error}).") from None
        pixels = cast(np.ndarray[Any, np.dtype[np.uint8]], converted.to_ndarray())
        swapped, flips = _orientation(self._frame)
        if swapped:
            pixels = np.ascontiguousarray(pixels.swapaxes(0, 1))
        return pixels if flips is None else np.asarray(cv2.flip(pixels, flips))

    def unreadable(self, reason: str) -> UserError:
        """Return what says that no frame can be read."""
        return UserError(f"Cannot read {self.path} as a video: 0 frames read ({reason}). {REMEDY}")

    def _pictures(self, max_pixels: int) -> av.VideoStream:
        """Return the first stream of moving pictures: a song's cover is none."""
        moving = [stream for stream in self._container.streams.video if not stream.disposition & _COVERS]
        if not moving:
            raise UserError(f"{self.path} has no moving pictures, sound alone perhaps. Give a file that has some.")
        codec = moving[0].codec_context
        if codec is None:
            raise self.unreadable("no decoder knows what its pictures are compressed by")
        if codec.width * codec.height > max_pixels:
            raise FrameTooLarge(
                f"{self.path} claims frames of {codec.width} x {codec.height} pixels; at most {max_pixels:,} are "
                "read. Make it smaller (ffmpeg -i IN -vf scale=4096:-2 OUT.mp4)."
            )
        # later frames may be larger; the decoder also counts what a codec adds at the edges
        codec.options = {"max_pixels": str(min(MOST_PIXELS, 2 * max_pixels + 2**16))}
        return moving[0]

    def _decoded(self) -> Generator[av.VideoFrame]:
        silent = 0  # packets since the last frame
        try:
            for packet in self._container.demux(self._stream):
                silent += 1
                if silent > _MOST_SILENT:
                    raise UserError(f"{self.path} has {_MOST_SILENT} packets in a row that hold no frame. {REMEDY}")
                try:
                    frames = packet.decode()
                except FFmpegError:
                    continue
                if frames:
                    silent = 0
                yield from frames
        except FFmpegError:
            return

    def _seconds(self) -> float:
        """Return how long the pictures last, as the header says; sound may last longer, and then only that is told."""
        if self._stream.duration:
            return float(self._stream.duration * self.time_base)
        if told := _CLOCK.fullmatch(self._stream.metadata.get("DURATION", "")):  # of Matroska
            hours, minutes, seconds = map(float, told.groups())
            return 3600 * hours + 60 * minutes + seconds - float(self.start)
        alone = len(self._container.streams) == 1
        return (self._container.duration or 0) / av.time_base if alone else 0.0


def _orientation(frame: av.VideoFrame) -> tuple[bool, int | None]:
    """Return whether a frame's rows are shown as columns, and what OpenCV's flip then does; None: nothing."""
    tag = cast(Mapping[str, Buffer], frame.side_data).get("DISPLAYMATRIX")
    if tag is None:
        return False, None
    # ISO 14496-12, 8.3.2: (x, y) is shown at (a x + c y, b x + d y)
    a, b, _, c, d = struct.unpack("=5i", bytes(tag)[:20])
    swapped = abs(b) + abs(c) > abs(a) + abs(d)
    across, down = (c < 0, b < 0) if swapped else (a < 0, d < 0)
    return swapped, {(True, False): 1, (False, True): 0, (True, True): -1}.get((across, down))


def rgb(image: np.ndarray) -> np.ndarray:
    """Return a decoder's pixels as (H, W, 3) uint8 RGB."""
    return np.asarray(cv2.cvtColor(image, cv2.COLOR_BGR2RGB))
