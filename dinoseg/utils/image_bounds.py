"""Bounds on what a small image file may cost to decode, beyond its number of pixels: JPEG scans and TIFF blocks."""

import math
import re
import struct

from PIL import Image
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.TiffImagePlugin import TiffImageFile

MOST_SCANS = 32  # of a JPEG file: each is a pass over all pixels; progressive encoders write about ten
MOST_BLOCK_PIXELS = 2**22  # of a TIFF tile that is larger than its image
MOST_TILE_RATIO = 4  # of the pixels of a TIFF tile above that to those of its image
_MOST_TAGS = 2**16  # of a TIFF file that are read
_SCAN, _END = 0xDA, 0xD9
_MARKER = re.compile(rb"\xff+([^\x00\x01\xff\xd0-\xd8])", re.DOTALL)  # those with a length, and the end
_WIDTH, _HEIGHT, _SAMPLES, _ROWS, _TILE_WIDTH, _TILE_HEIGHT = 256, 257, 277, 278, 322, 323  # TIFF tags
_OFFSETS = (273, 324)  # TIFF tags: of strips, of tiles
_LAYOUT = (_WIDTH, _HEIGHT, _SAMPLES, _ROWS, _TILE_WIDTH, _TILE_HEIGHT, *_OFFSETS)


class Unfit(Exception):
    """An image that was opened, but is of no use; the text continues a sentence that begins with its name."""


def check_cost(image: Image.Image) -> None:
    """Refuse an opened image that costs far more time or memory to decode than its pixels do.

    Raises:
        Unfit: its file has too many scans, or blocks that are larger or more than its pixels need.
    """
    if not isinstance(image, ImageFile) or image.fp is None or image.fp.closed or not image.tile:
        return  # decoded already, or never a file
    position = image.fp.tell()
    if isinstance(image, JpegImageFile):
        image.fp.seek(0)
        scans = _count_scans(image.fp.read())
        if scans > MOST_SCANS:
            raise Unfit(f"has {scans} JPEG scans, and at most {MOST_SCANS} are decoded. Save it anew")
    elif isinstance(image, TiffImageFile):
        _check_blocks(image)
    image.fp.seek(position)


def _count_scans(data: bytes) -> int:
    """Return the number of scans of the first image of a JPEG file; exact only above `MOST_SCANS`."""
    found = data.count(b"\xff\xda")
    if found <= MOST_SCANS:
        return found
    scans, position = 0, 2
    while (match := _MARKER.search(data, position)) and match[1][0] != _END:
        scans += match[1][0] == _SCAN
        position = match.end() + int.from_bytes(data[match.end() : match.end() + 2], "big")
    return scans


def _check_blocks(image: TiffImageFile) -> None:
    tags = image.tag_v2
    numbers = _tag_numbers(image)
    if twice := [number for number in _LAYOUT if numbers.count(number) > 1]:
        raise Unfit(f"has the TIFF tag {twice[0]} twice. Save it anew")
    if skipped := [number for number in _LAYOUT if number in numbers and number not in tags]:  # but not by libtiff
        raise Unfit(f"has the TIFF tag {skipped[0]} in a form that is not read. Save it anew")
    width, height = tags[_WIDTH], tags[_HEIGHT]
    is_tiled = _TILE_WIDTH in tags or _TILE_HEIGHT in tags
    columns, rows = (tags.get(_TILE_WIDTH), tags.get(_TILE_HEIGHT)) if is_tiled else (width, tags.get(_ROWS, height))
    if not (isinstance(columns, int) and isinstance(rows, int) and min(columns, rows) > 0):
        raise Unfit(f"has TIFF blocks of {columns} x {rows} pixels. Save it anew")
    if is_tiled and columns * rows > max(MOST_BLOCK_PIXELS, MOST_TILE_RATIO * (width + 15) * (height + 15)):
        raise Unfit(f"has {width} x {height} pixels in TIFF tiles of {columns} x {rows}. Save it with smaller ones")
    offsets = tags.get(_OFFSETS[is_tiled], ())
    needed = math.ceil(width / columns) * math.ceil(height / rows) * tags.get(_SAMPLES, 1)
    if len(offsets) > needed:
        raise Unfit(f"has {len(offsets)} TIFF blocks, and its pixels need {needed}. Save it anew")


def _tag_numbers(image: TiffImageFile) -> list[int]:
    """Return the numbers of all tags of a file's first image: libtiff heeds the first of two, Pillow the last."""
    assert image.fp is not None and image.tag_v2.offset is not None
    order = "<" if image.tag_v2.prefix == b"II" else ">"
    image.fp.seek(2)
    is_big = struct.unpack(f"{order}H", image.fp.read(2)) == (43,)
    count_form, size = ("Q", 20) if is_big else ("H", 12)
    image.fp.seek(image.tag_v2.offset)
    (count,) = struct.unpack(order + count_form, image.fp.read(struct.calcsize(count_form)))
    entries = image.fp.read(min(count, _MOST_TAGS) * size)
    return [number for (number,) in struct.iter_unpack(f"{order}H{size - 2}x", entries[: len(entries) // size * size])]
