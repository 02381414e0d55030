"""Video decoder: upright frames in sequence, each with its time; all decoding in the package happens here."""

import os
import re
import struct
from collections.abc import Generator, Iterator, Mapping
from contextlib import suppress
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import av
import cv2
import numpy as np
from av.buffer import Buffer
from av.error import FFmpegError
from av.index import IndexEntry
from av.stream import Disposition
from av.video.reformatter import Interpolation, VideoReformatter

from dinoseg.utils.errors import UserError
from dinoseg.utils.files import check_regular

VERSION = av.__version__  # version of the decoder: another one may give other pixels
# FFmpeg's names of containers with video data; playlists are excluded, since they could refer to other files
_FORMATS = (
    "mov,matroska,avi,mpegts,mpeg,mpegvideo,asf,flv,ogg,mxf,nut,dv,ivf,gif,apng,h264,hevc,m4v,mjpeg,yuv4mpegpipe,obu"
)
_COVERS = Disposition.attached_pic | Disposition.timed_thumbnails
_CLOCK = re.compile(r"(\d{1,4}):(\d\d):(\d\d(?:\.\d+)?)")
MAX_PIXELS = 2**27  # per frame: 16384 x 8192, more than any video has, since a file of a kilobyte may claim any size
_MAX_SILENT = 10_000  # packets without a frame: minutes that lack the initial key frame
_MAX_AVI_CHUNKS = 1000  # before an AVI file's index, which has a handful
_MAX_AVI_INDEX = 2**26  # bytes: four million frames
_UNCOUNTED = 1  # frames, or packets, that a whole file may lack: some writers count dropped frames
REMEDY = "It is truncated, damaged or not a video: replace it, or re-encode it (ffmpeg -i IN OUT.mp4)."


def count_slots(path: str | Path, stream: int) -> int:
    """Return the number of time slots of a stream in the index at the end of an AVI file; 0 if it has none.

    Empty slots count: FFmpeg's index leaves out those behind the last frame.
    """
    with open(path, "rb") as file:
        file.seek(12)  # behind "RIFF", the size and "AVI "
        head = file.read(8)
        for _ in range(_MAX_AVI_CHUNKS):
            if head[:4] in (b"", b"idx1"):
                break
            size = int.from_bytes(head[4:], "little")
            file.seek(size + size % 2, os.SEEK_CUR)
            head = file.read(8)
        size = int.from_bytes(head[4:], "little") if head[:4] == b"idx1" else 0
        entries = file.read(min(size, _MAX_AVI_INDEX))
    ids = np.frombuffer(entries[: len(entries) // 16 * 16], "S4, V12")["f0"]
    return int(np.isin(ids, [b"%02ddc" % stream, b"%02ddb" % stream]).sum())


class Decoder:
    """Open video. `advance` decodes the next frame, to which the other methods refer.

    Damaged packets are skipped, and a truncated file ends early: see `is_truncated`.

    - `rate`: frame rate by the container, 0 if unknown.
    - `start`, `time_base`: start of the file's clock in seconds, and the length of its ticks.

    Args:
        path: the file, opened with FFmpeg's file protocol only.
        threads: codec threads; 0: FFmpeg's choice. A single thread is fork-safe and does not compete with other
            processes.
        max_pixels: maximum number of pixels of a frame.

    Raises:
        UserError: it is not a file or not a video, or its frames have more pixels by the header; from `advance`: far
            more packets than frames.
        OSError: the file does not exist, or access is denied.
    """

    def __init__(self, path: str | Path, *, threads: int = 0, max_pixels: int = MAX_PIXELS) -> None:
        check_regular(path)
        self.path = path
        only_files = {"protocol_whitelist": "file", "format_whitelist": _FORMATS}
        try:
            self._container = av.open(f"file:{path}", options=only_files)
        except FFmpegError as error:
            raise self.unreadable(str(error.strerror)) from None
        try:
            self._stream = self._pictures(max_pixels)
        except UserError:
            self._container.close()
            raise
        self._stream.thread_type = "AUTO" if threads == 0 else "NONE"
        self._stream.codec_context.thread_count = threads
        self._reformatter = VideoReformatter()
        self._threads = threads
        self._frame: av.VideoFrame
        self._read = 0  # frames
        self._end: int | None = None  # largest time of a packet in ticks, see `_time_of`
        self._undecodable = 0  # packets
        self._frames = self._decode_frames()
        self.rate = self._stream.guessed_rate or Fraction(0)
        self.time_base = self._stream.time_base or Fraction(1, 1000)
        self.start = Fraction(self._container.start_time or 0, av.time_base)

    @property
    def fps(self) -> float:
        """Frames per second by the container; 0 if unknown."""
        return float(self.rate)

    @property
    def pixel_aspect(self) -> Fraction:
        """Width of a pixel divided by its height, in the upright frame; 1 if the file does not state it."""
        aspect = self._stream.sample_aspect_ratio or Fraction(1)
        return 1 / aspect if _orientation(self._frame)[0] else aspect

    @property
    def colour_tags(self) -> tuple[int, int, int]:
        """The file's colour primaries, transfer and matrix, as code points of H.273."""
        codec = self._stream.codec_context
        return codec.color_primaries, codec.color_trc, codec.colorspace

    def advance(self) -> bool:
        """Decode the next frame; return whether there is one."""
        frame = next(self._frames, None)
        if frame is not None:
            self._frame = frame
            self._read += 1
        return frame is not None

    @cached_property
    def declared_frames(self) -> int:
        """Number of frames by the container; 0 if unknown.

        It may be off by one or two. Frames outside an edit list and empty time slots do not count. Without a frame
        count, it is duration times rate.
        """
        counted = self._stream.frames
        if not counted:
            return int(self._seconds() * self.fps + 0.5)
        entries = self._index
        return sum(not entry.is_discard and entry.size > 0 for entry in entries) if entries else counted

    def is_truncated(self) -> bool:
        """Return whether a file that was read from its start to its end, and is still open, has lost frames.

        The file is whole if it holds all promised frames. With fewer frames, it is whole if its last packet has the
        announced time: decoders drop frames that refer to others before a cut.
        """
        if self._read >= max(1, self.declared_frames - _UNCOUNTED):
            return False
        if self._stream.frames and self._undecodable > _UNCOUNTED:
            return True
        return self._read == 0 or self._end is None or self._end < self._announced_end()

    def check_whole(self) -> None:
        """Raise a UserError if `is_truncated`."""
        if self.is_truncated():
            raise UserError(
                f"{self.path} is truncated: {self._read} frames read, {self.declared_frames} promised. Replace it."
            )

    @cached_property
    def _index(self) -> list[IndexEntry]:
        """The container's index of all packets of the video, in decoding order; empty if it has none."""
        entries = list(self._stream.index_entries)
        if self._is_slotted and entries and entries[-1].timestamp < self._stream.frames - 1 - _UNCOUNTED:
            # the last slots of a whole file are empty; a truncated file lacks its own index, and FFmpeg makes one of
            # the packets that it has seen
            is_whole = count_slots(self.path, self._stream.index) >= self._stream.frames
            return entries if is_whole else []
        return entries

    @property
    def _is_slotted(self) -> bool:
        """Return whether the container's frame count is a number of time slots of one tick, which may be empty."""
        return self._container.format.name == "avi"

    def _time_of(self, packet: av.Packet) -> int | None:
        """Return a packet's time in ticks: of decoding, as an index states it, or of presentation, as a duration."""
        return packet.dts if self._stream.frames else packet.pts

    def _announced_end(self) -> float:
        """Return the earliest time of the last packet of a whole file, in ticks, see `_time_of`."""
        frame = 1 / (self.rate * self.time_base) if self.rate else Fraction(0)  # ticks
        if self._stream.frames and self._index:
            last = Fraction(self._index[-1].timestamp)
        elif self._is_slotted:
            last = Fraction(self._stream.frames - 1)
        else:
            last = (self.start + Fraction(self._seconds())) / self.time_base - frame
        return float(last - _UNCOUNTED * frame - frame / 2)

    @property
    def time(self) -> Fraction | None:
        """Presentation time of the frame in seconds on the file's own clock; None if the file does not state it."""
        return None if self._frame.pts is None else self._frame.pts * self.time_base

    def image(self) -> np.ndarray:
        """Return the frame's pixels (H, W, 3) uint8 BGR, oriented as the file states, to the nearest quarter turn.

        Raises:
            UserError: the frame cannot be converted.
        """
        return self._convert_frame("bgr24")

    def rgb_image(self) -> np.ndarray:
        """Return `rgb(self.image())`, bit-identical but faster."""
        deep = any(component.bits > 8 for component in self._frame.format.components)
        return rgb(self.image()) if deep else self._convert_frame("rgb24")  # depths over 8 bits round differently

    def packets(self) -> Iterator[av.Packet]:
        """Yield the packets of all streams in storage order; no frame can be decoded afterwards."""
        with suppress(FFmpegError):  # truncated
            yield from self._container.demux()

    def jump(self, time: float) -> None:
        """Seek so that the next frame is at this time in milliseconds or earlier, as near as the container allows.

        Raises:
            OSError: seeking failed.
        """
        self._container.seek(round(time / 1000 / self.time_base), stream=self._stream)
        self._frames = self._decode_frames()

    def close(self) -> None:
        """Release the file."""
        self._frames.close()
        self._container.close()

    def __enter__(self) -> "Decoder":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _convert_frame(self, order: str) -> np.ndarray:
        try:
            # bicubic, as OpenCV's reader requests: pixels are bit-identical to its own
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
        """Return the error that no frame can be read."""
        return UserError(f"Cannot read {self.path} as a video: 0 frames read ({reason}). {REMEDY}")

    def _pictures(self, max_pixels: int) -> av.VideoStream:
        """Return the first stream of moving pictures, which excludes cover art."""
        moving = [stream for stream in self._container.streams.video if not stream.disposition & _COVERS]
        if not moving:
            raise UserError(f"{self.path} has no video stream, perhaps audio only. Give a file with video.")
        codec = moving[0].codec_context
        if codec is None:
            raise self.unreadable("its video codec is not supported")
        if codec.width * codec.height > max_pixels:
            raise UserError(
                f"{self.path} claims frames of {codec.width} x {codec.height} pixels; at most {max_pixels:,} are read. "
                "Downscale it (ffmpeg -i IN -vf scale=4096:-2 OUT.mp4)."
            )
        # later frames may be larger, and the decoder's limit includes a codec's padding
        codec.options = {"max_pixels": str(min(MAX_PIXELS, 2 * max_pixels + 2**16))}
        return moving[0]

    def _decode_frames(self) -> Generator[av.VideoFrame]:
        silent = 0  # packets since the last frame
        try:
            for packet in self._container.demux(self._stream):
                if (time := self._time_of(packet)) is not None:
                    self._end = time if self._end is None else max(time, self._end)
                silent += 1
                if silent > _MAX_SILENT:
                    raise UserError(f"{self.path} has {_MAX_SILENT} packets in a row without a frame. {REMEDY}")
                try:
                    frames = packet.decode()
                except FFmpegError:
                    self._undecodable += 1
                    continue
                if frames:
                    silent = 0
                yield from frames
        except FFmpegError:
            return

    def _seconds(self) -> float:
        """Return the duration of the video stream by the header, or 0 if unknown.

        The container's duration is used only if the file has a single stream, since audio may be longer.
        """
        if self._stream.duration:
            return float(self._stream.duration * self.time_base)
        if clock := _CLOCK.fullmatch(self._stream.metadata.get("DURATION", "")):  # in Matroska files
            hours, minutes, seconds = map(float, clock.groups())
            return 3600 * hours + 60 * minutes + seconds - float(self.start)
        alone = len(self._container.streams) == 1
        return (self._container.duration or 0) / av.time_base if alone else 0.0


def _orientation(frame: av.VideoFrame) -> tuple[bool, int | None]:
    """Return whether to transpose a frame, and the code for `cv2.flip` after that; None: no flip."""
    tag = cast(Mapping[str, Buffer], frame.side_data).get("DISPLAYMATRIX")
    if tag is None:
        return False, None
    # ISO 14496-12, 8.3.2: (x, y) is shown at (a x + c y, b x + d y)
    a, b, _, c, d = struct.unpack("=5i", bytes(tag)[:20])
    swapped = abs(b) + abs(c) > abs(a) + abs(d)
    across, down = (c < 0, b < 0) if swapped else (a < 0, d < 0)
    return swapped, {(True, False): 1, (False, True): 0, (True, True): -1}.get((across, down))


def rgb(image: np.ndarray) -> np.ndarray:
    """Return a decoder's BGR pixels as (H, W, 3) uint8 RGB."""
    return np.asarray(cv2.cvtColor(image, cv2.COLOR_BGR2RGB))
