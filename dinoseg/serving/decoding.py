"""Image decoding in child processes, which bound the time and memory that an upload costs.

`decode_images` runs in such a process, `Decoders` in the server.
"""

import io
import queue
import struct
import threading
import warnings
from collections.abc import Callable

import numpy as np
from PIL import Image, UnidentifiedImageError

from dinoseg.serving.limits import MIB, Refused
from dinoseg.utils.child import Channel, Child, ChildEnded, Message
from dinoseg.utils.errors import UserError
from dinoseg.utils.image_cost import Unfit, check_header
from dinoseg.utils.images import FORMATS, as_rgb

_NAME = "The image"
PROCESSES = 4
SECONDS = 10.0  # timeout of decoding; 16 million pixels take about 1 s
_BYTES_PER_PIXEL, _MORE = 40, 256 * MIB  # memory limit of decoding: 16-bit grey, progressive JPEG


class Decoders:
    """Pool of processes that decode one image each at a time; killed ones are replaced.

    Args:
        max_pixels: of an image.
        seconds: timeout of decoding an image.
        count: number of processes, which start at once.
    """

    def __init__(self, max_pixels: int, *, seconds: float = SECONDS, count: int = PROCESSES) -> None:
        self._max_pixels, self._seconds = max_pixels, seconds
        self._idle: queue.LifoQueue[Child] = queue.LifoQueue()  # last used first: its memory is warm
        self._lock = threading.Lock()
        self._children: list[Child] = []
        self._is_ended = False
        for _ in range(count):
            self._idle.put(self._started())

    def decode(self, data: bytes, max_pixels: int, admit: Callable[[int], None]) -> np.ndarray:
        """Decode an image as mode=predict reads it: (H, W, 3) uint8 RGB.

        Args:
            data: the encoded image.
            max_pixels: largest number of pixels.
            admit: called with the number of pixels, from the header, during decoding; may refuse the image.

        Raises:
            Refused: if the image is empty, invalid, too large, animated or damaged, or takes too much time or memory.
        """
        child = self._idle.get()
        try:
            if not child.is_alive:  # killed while it was idle
                child.close()
                child = self._started()
            with child.deadline(self._seconds):
                child.send({"max_pixels": max_pixels}, data)
                header, _ = _answer(child)
                try:
                    admit(header["pixels"])
                finally:
                    header, pixels = _answer(child)
            return np.frombuffer(pixels, np.uint8).reshape(header["size"])
        except Refused:
            raise
        except ChildEnded as error:
            child.close()
            child = self._started()
            raise self._reason(error) from None
        except BaseException:
            child.close()  # its pipe may hold the rest of this image; the next caller replaces it
            raise
        finally:
            self._idle.put(child)

    def end(self) -> None:
        """Kill all processes: images in progress and later ones are refused."""
        with self._lock:
            self._is_ended = True
            for child in self._children:
                child.close()

    def _started(self) -> Child:
        """Return a new process; after `end`, one that is already killed."""
        with self._lock:
            child = Child(decode_images, _MORE + _BYTES_PER_PIXEL * self._max_pixels)
            self._children = [child, *(other for other in self._children if other.is_alive)]
            if self._is_ended:
                child.close()
        return child

    def _reason(self, error: ChildEnded) -> Refused:
        if self._is_ended:
            return Refused(503, "busy", "The server is stopping. Try again later.", retry_after=1)
        if error.late:
            return Refused(
                400, "decode_time", f"{_NAME} is not decoded within {self._seconds:g} s. Save it again, or reduce it."
            )
        return Refused(400, "unreadable", f"{_NAME} crashed its decoder process. It is damaged: send it again.")


def decode_images(channel: Channel) -> None:
    """Respond to each encoded image with its number of pixels, from its header, and then with its pixels."""
    warnings.simplefilter("ignore")  # about odd metadata
    while (message := channel.receive()) is not None:
        header, data = message
        try:
            channel.send({"pixels": measure(data, header["max_pixels"])})
            pixels = decode(data)
            channel.send({"size": pixels.shape}, np.ascontiguousarray(pixels).data.cast("B"))
        except Refused as error:
            channel.send({"refused": [error.status, error.rule, error.message]})
        except MemoryError:
            reason = f"{_NAME} needs more memory to decode than its pixels require. Save it again, as JPEG or PNG."
            channel.send({"refused": [400, "decode_memory", reason]})


def measure(data: bytes, max_pixels: int) -> int:
    """Return the number of pixels of an encoded image from its header, without decoding it.

    Raises:
        Refused: if the image is empty, invalid, too large or animated, or its header has too many parts.
    """
    if not data:
        raise Refused(400, "empty", f"{_NAME} has 0 bytes. Send the file's content: curl -F image=@FILE.")
    try:
        with _opened(data) as image:
            width, height = image.size
            # the first frame of a phone's MPO is the photo, the others its previews; counting
            # frames would read each one of a TIFF file
            is_animated = image.format != "MPO" and getattr(image, "is_animated", False)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise Refused(400, "max_pixels", f"{_NAME} is too large ({error}). {_smaller(max_pixels)}") from error
    except UnidentifiedImageError as error:
        raise Refused(
            400, "format", f"{_NAME} has an unsupported format. Send JPEG, PNG, WebP, TIFF or BMP."
        ) from error
    except (OSError, SyntaxError, ValueError, struct.error) as error:
        raise _unreadable(error) from error
    if width * height > max_pixels:
        raise Refused(400, "max_pixels", f"{_NAME} has {width} x {height} pixels. {_smaller(max_pixels)}")
    if is_animated:
        raise Refused(400, "one_frame", f"{_NAME} has several frames. Send a single frame.")
    return width * height


def decode(data: bytes) -> np.ndarray:
    """Decode an image, measured before, as mode=predict reads it: (H, W, 3) uint8 RGB.

    Raises:
        Refused: if the image is truncated or damaged, or holds other values than levels of 8 or 16 bits.
    """
    try:
        with _opened(data) as image:
            return as_rgb(image, _NAME)
    except UserError as error:
        raise Refused(400, "unreadable", str(error)) from error
    except (OSError, SyntaxError, ValueError, struct.error) as error:
        raise _unreadable(error) from error


def _answer(child: Child) -> Message:
    """Return a process's answer, or raise the `Refused` in it."""
    header, body = child.receive()
    if "refused" in header:
        raise Refused(*header["refused"])
    return header, body


def _opened(data: bytes) -> Image.Image:
    file = io.BytesIO(data)
    try:
        check_header(file)
    except Unfit as error:
        raise Refused(400, "unreadable", f"{_NAME} {error}.") from None
    return Image.open(file, formats=FORMATS)


def _unreadable(error: Exception) -> Refused:
    return Refused(400, "unreadable", f"{_NAME} cannot be read ({error}). It is damaged: send it again.")


def _smaller(max_pixels: int) -> str:
    return f"The limit is {max_pixels} (mode.limits.max_pixels): reduce it or split it."
