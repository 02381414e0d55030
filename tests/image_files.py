"""Image files as bytes: encoded by Pillow, or put together by hand."""

import io
import struct
import zlib

from PIL import Image


def encode_image(pixels, kind="PNG", **options):
    """Return the file of an image of Pillow or of an array."""
    file = io.BytesIO()
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(file, kind, **options)
    return file.getvalue()


def png_chunk(name, content):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def tiff_file(entries, data=b"", order="<"):
    """Return a TIFF file of data, which begin at byte 8, and a directory of entries: tag, type, count, value."""
    start = b"II*\0" if order == "<" else b"MM\0*"
    file = start + struct.pack(f"{order}I", 8 + len(data)) + data + struct.pack(f"{order}H", len(entries))
    for tag, kind, count, value in entries:
        is_short = kind == 3 and count == 1  # stands in the first half of its field
        number = struct.pack(f"{order}HH", value, 0) if is_short else struct.pack(f"{order}I", value)
        file += struct.pack(f"{order}HHI", tag, kind, count) + number
    return file + bytes(4)
