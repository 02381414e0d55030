"""Decoding of uploads in child processes, which bound the time and memory that a hostile file costs.

`decode_images` and `decode_video` run in such a process; `ImageDecoder` and `VideoDecoder` are its ends in the server.
"""

import logging
import warnings
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from dinoseg.extensions.serving.child import Channel, Child, ChildEnded, Message
from dinoseg.extensions.video.length import has_more_packets
from dinoseg.extensions.video.prediction import VideoReader, VideoTraits
from dinoseg.utils.errors import UserError
from dinoseg.utils.images import read_image, read_size

SECONDS = 10.0  # timeout of an image or a frame; 16 million pixels take about 1 s
MIB = 2**20
_IMAGE_MEMORY = (40, 256 * MIB)  # bytes per pixel, and beyond: 16-bit grey, progressive JPEG
_VIDEO_MEMORY = (64, 512 * MIB)  # the same: reference frames, and threads
_PACKETS_PER_SECOND = 2000  # of all streams of a video
_FRAMES_PER_SECOND = 60
_VIDEO_SIGNATURES = ((4, b"ftyp"), (0, b"\x1a\x45\xdf\xa3"), (8, b"AVI "))  # MP4 and MOV; MKV and WebM; AVI

TimedFrame = tuple[np.ndarray, Fraction | None]


class _Decoder:
    """Server's end of a process that decodes files of up to `max_pixels` per image or frame."""

    def __init__(self, function: Callable[[Channel], None], memory: tuple[int, int], max_pixels: int) -> None:
        self.max_pixels = max_pixels
        self._function = function
        self._memory = memory[0] * max_pixels + memory[1]
        self._child = Child(function, self._memory)

    def kill(self) -> None:
        """End the process: a pending request of another thread raises an error."""
        self._child.kill()

    def close(self) -> None:
        """End the process, and release its pipes."""
        self._child.close()

    def _request(self, request: dict[str, Any] | None = None) -> Message:
        """Send a request, if one is given, and return the next message of the process.

        Raises:
            UserError: if the message is an error, or the process takes too long or has ended.
        """
        try:
            with self._child.deadline(SECONDS):
                if request is not None:
                    self._child.send(request)
                answer, body = self._child.receive()
        except ChildEnded as error:
            reason = f"is not decoded within {SECONDS:g} s" if error.late else "crashed its decoder process"
            raise UserError(f"The file {reason}. Reduce it, or convert it to PNG or MP4.") from None
        if "error" in answer:
            raise UserError(answer["error"])
        return answer, body


class ImageDecoder(_Decoder):
    """Process that decodes one image after another; it is replaced when an image has ended it."""

    def __init__(self, max_pixels: int, *, layers: int = 1) -> None:
        super().__init__(decode_images, _IMAGE_MEMORY, max_pixels)
        self._bounds = {"max_pixels": max_pixels, "layers": layers}

    def decode(self, path: Path) -> np.ndarray:
        """Return an image as mode=predict reads it: (H, W, 3) uint8 RGB. Not for several threads at once.

        Raises:
            UserError: if it is damaged, too large or no image, or takes too much time or memory.
        """
        if not self._child.is_alive:
            self._child.close()
            self._child = Child(self._function, self._memory)
        try:
            answer, pixels = self._request({"path": str(path), **self._bounds})
        except UserError:
            raise
        except BaseException:
            self.close()  # its pipe may hold the rest of this image
            raise
        return np.frombuffer(pixels, np.uint8).reshape(answer["size"])


class VideoDecoder(_Decoder):
    """Frames and properties of a video as `VideoReader` gives them.

    Args:
        path: the file.
        max_pixels: of a frame.
        max_seconds: longest video; at 60 frames a second, a faster one has to be shorter.

    Raises:
        UserError: if it is no video, is too large or too long, takes too much time, or has far too many packets.
    """

    def __init__(self, path: Path, *, max_pixels: int, max_seconds: float) -> None:
        super().__init__(decode_video, _VIDEO_MEMORY, max_pixels)
        self._max_seconds = max_seconds
        packets = int(_PACKETS_PER_SECOND * max_seconds)
        try:
            about, _ = self._request({"path": str(path), "max_pixels": max_pixels, "packets": packets})
            self.size = (about["size"][0], about["size"][1])  # (H, W)
            self.rate = Fraction(*about["rate"])
            self.count = about["count"]  # of frames, by the header
            self.traits = VideoTraits(Fraction(*about["tick"]), Fraction(*about["aspect"]), tuple(about["colours"]))
            self._check_length(self.count)
        except BaseException:
            self.close()
            raise

    def frames(self) -> Iterator[TimedFrame]:
        """Yield each frame (H, W, 3) uint8 RGB with its time in seconds, None where the video does not state it.

        Raises:
            UserError: if the video is damaged or longer than its header states, or a frame takes too long.
        """
        count = 0
        while True:
            header, pixels = self._request()
            if "end" in header:
                return
            count += 1
            self._check_length(count)
            time = None if header["time"] is None else Fraction(*header["time"])
            yield np.frombuffer(pixels, np.uint8).reshape(*self.size, 3), time

    def _check_length(self, count: int) -> None:
        if count > self._max_seconds * min(float(self.rate), _FRAMES_PER_SECOND):
            raise UserError(
                f"The video has {count} frames or more, at {float(self.rate):g} per second. The limit is "
                f"{self._max_seconds:g} s (mode.max_seconds) at {_FRAMES_PER_SECOND} per second: cut it."
            )


def decode_images(channel: Channel) -> None:
    """Answer each request with the pixels of the image that it names."""
    warnings.simplefilter("ignore")  # about odd metadata
    logging.getLogger("tifffile").disabled = True  # it logs each odd tag
    while (message := channel.receive()) is not None:
        request = message[0]
        try:
            pixels = read_bounded_image(Path(request["path"]), request["max_pixels"], request["layers"])
        except UserError as error:
            _send_error(channel, error, request["path"])
        else:
            channel.send({"size": pixels.shape}, np.ascontiguousarray(pixels).data.cast("B"))


def read_bounded_image(path: Path, max_pixels: int, layers: int = 1) -> np.ndarray:
    """Read an image (H, W, 3) uint8 RGB, if its header states at most `max_pixels`, the limit for this many layers.

    Raises:
        UserError: if it has more, or is damaged or no image.
    """
    height, width = read_size(path)
    if height * width > max_pixels:
        allowed = f"which mode.max_pixels allows for {layers} layers" if layers > 1 else "the limit of mode.max_pixels"
        raise UserError(f"{path} has {width} x {height} pixels, more than {max_pixels}, {allowed}. Reduce it.")
    return read_image(path)


def decode_video(channel: Channel) -> None:
    """Send the properties and then the frames of the requested video, as fast as the receiver reads them."""
    message = channel.receive()
    if message is None:
        return
    request = message[0]
    path = Path(request["path"])
    try:
        if not is_video(path):
            raise UserError(f"{path} is not a video. Convert it to MP4.")
        if has_more_packets(path, request["packets"]):
            raise UserError(f"{path} has more than {request['packets']} packets. Cut it, or re-encode it.")
        with VideoReader(path, max_pixels=request["max_pixels"]) as reader:
            traits = reader.traits
            ratios = {"rate": reader.rate, "tick": traits.tick, "aspect": traits.aspect}
            known = {name: ratio.as_integer_ratio() for name, ratio in ratios.items()}
            channel.send({"size": reader.size, "count": reader.count, "colours": traits.colours, **known})
            for frame, time in reader.timed_frames():
                shown = None if time is None else time.as_integer_ratio()
                channel.send({"time": shown}, np.ascontiguousarray(frame).data.cast("B"))
        channel.send({"end": True})
    except (UserError, OSError) as error:  # OSError: the page was closed, and its upload removed
        _send_error(channel, error, request["path"])
    except MemoryError:
        channel.send({"error": "The file needs more memory to decode than its frames require. Re-encode it."})


def is_video(path: Path) -> bool:
    """Return whether a file begins like MP4, MOV, MKV, WebM or AVI.

    Readers choose a format by content: a playlist that is uploaded as a video could make them read other files.
    """
    with path.open("rb") as file:
        start = file.read(16)
    return any(start[at : at + len(mark)] == mark for at, mark in _VIDEO_SIGNATURES)


def _send_error(channel: Channel, error: Exception, path: str) -> None:
    message = str(error).replace(path, "the file")  # clients are not told where it is stored
    channel.send({"error": message[:1].upper() + message[1:]})
