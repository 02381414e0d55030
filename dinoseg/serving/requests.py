"""What a request brings: its bytes counted as they come, and the picture in them looked at before it is decoded."""

import io
import struct

import numpy as np
from PIL import Image, UnidentifiedImageError
from python_multipart.multipart import parse_options_header
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import Message, Receive

from dinoseg.errors import UserError
from dinoseg.images import as_rgb
from dinoseg.serving.limits import MIB, Refused, not_kept

_FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP")  # Pillow's names of those that mode=predict reads
_CHARSETS = ("utf-8", "us-ascii", "iso-8859-1")  # of the names in a form
_NAME = "The image"


def bounded(request: Request, mib: float) -> Request:
    """Return the request as one that is refused once more than so many MiB have come, or are announced.

    Raises:
        Refused: announced, or later while it is read.
    """
    most = int(mib * MIB)
    announced = request.headers.get("content-length", "")
    if announced.isascii() and announced.isdigit() and int(announced) > most:
        raise _too_long(mib)
    return Request(request.scope, _counted(request.receive, mib, most))


async def read_upload(request: Request) -> bytes:
    """Return the one file of a multipart form, or else the whole body.

    Raises:
        Refused: a form without a file, with several, or that cannot be read.
    """
    kind, parameters = parse_options_header(request.headers.get("content-type"))
    if kind != b"multipart/form-data":
        return await request.body()
    charset = parameters.get(b"charset", b"utf-8").decode("latin-1")
    if charset.lower() not in _CHARSETS:  # some codecs fail in ways of their own, or take quadratic time
        known = ", ".join(_CHARSETS)
        raise Refused(400, "one_file", f"The form is in charset={charset!r:.40}, and may be in {known}. Leave it out.")
    try:
        async with request.form(max_files=2, max_fields=8) as form:
            files = [value for value in form.values() if isinstance(value, UploadFile)]
            if len(files) != 1:
                raise _not_one_file(f"has {len(files)} files")
            return await files[0].read()
    except HTTPException as error:
        raise _not_one_file(f"cannot be read ({error.detail.rstrip('.')})") from error
    except OSError as error:  # Starlette keeps more than a MiB in a file
        raise not_kept(error) from error


def measure(data: bytes, max_pixels: int) -> int:
    """Return the number of pixels of an encoded picture, from its header: nothing is decoded.

    Raises:
        Refused: it is empty, no picture, too large, or animated.
    """
    if not data:
        raise Refused(400, "empty", f"{_NAME} has 0 bytes. Send the file's content: curl -F image=@FILE.")
    try:
        with _opened(data) as image:
            width, height = image.size
            # of a phone's MPO the first is the photo, the others its previews
            frames = getattr(image, "n_frames", 1) if image.format != "MPO" else 1
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise Refused(400, "max_pixels", f"{_NAME} is too large ({error}). {_smaller(max_pixels)}") from error
    except UnidentifiedImageError as error:
        raise Refused(
            400, "format", f"{_NAME} is of no kind that is read here. Send JPEG, PNG, WebP, TIFF or BMP."
        ) from error
    except (OSError, SyntaxError, ValueError, struct.error) as error:
        raise _unreadable(error) from error
    if width * height > max_pixels:
        raise Refused(400, "max_pixels", f"{_NAME} has {width} x {height} pixels. {_smaller(max_pixels)}")
    if frames > 1:
        raise Refused(400, "one_frame", f"{_NAME} has {frames} frames, and one is segmented. Send a single frame.")
    return width * height


def decode(data: bytes) -> np.ndarray:
    """Return a picture as mode=predict reads it, (H, W, 3) uint8 RGB; it is measured before.

    Raises:
        Refused: it is truncated or damaged, or holds what are no levels of 8 or 16 bits.
    """
    try:
        with _opened(data) as image:
            return as_rgb(image, _NAME)
    except UserError as error:
        raise Refused(400, "unreadable", str(error)) from error
    except (OSError, SyntaxError, ValueError, struct.error) as error:
        raise _unreadable(error) from error


def _opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data), formats=_FORMATS)


def _unreadable(error: Exception) -> Refused:
    return Refused(400, "unreadable", f"{_NAME} cannot be read ({error}). It is damaged: send it anew.")


def _smaller(max_pixels: int) -> str:
    return f"At most {max_pixels} are taken (mode.limits.max_pixels): reduce it or cut it up."


def _not_one_file(what: str) -> Refused:
    return Refused(400, "one_file", f"The form {what}, and an answer is of one file. Send one: curl -F image=@FILE.")


def _too_long(mib: float) -> Refused:
    return Refused(413, "max_bytes", f"The request is longer than {mib:g} MiB. Send a smaller file.")


def _counted(receive: Receive, mib: float, most: int) -> Receive:
    seen = 0

    async def counted() -> Message:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        if seen > most:
            raise _too_long(mib)
        return message

    return counted
