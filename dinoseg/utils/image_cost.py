"""Limits on what an image file may cost to open and to decode, checked on its bytes before Pillow parses them."""

import io
import re
import struct
from typing import IO, Literal

from PIL import Image
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import MARKER as JPEG_MARKERS
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

MAX_SCANS = 32  # of a JPEG file: each is a pass over all pixels; progressive encoders write about ten
MAX_SEGMENTS = 2**10  # of a JPEG file; a profile or depth map takes up to 255
MAX_EXIF_SEGMENTS = 8  # of a JPEG file: Pillow copies all that it has for each further one; cameras write one
MAX_FILL = 2**16  # bytes between JPEG segments, which Pillow reads one by one
MAX_CHUNKS = 2**12  # of a PNG file, besides those of its pixels
MAX_PACKED_CHUNKS = 2**6  # of a PNG file: each may expand a thousandfold, to 1 MiB
MAX_TAGS = 2**12  # of a TIFF file or of EXIF: Pillow takes about 30 microseconds each
MAX_BLOCKS = 2**18  # of a TIFF page: Pillow takes about 300 bytes each
MAX_PAGES = 2**10  # of a TIFF file: as many as there may be channels
MAX_PAGE_TAGS = 2**16  # of all pages of a TIFF file
# most pixels per byte of a file; Pillow fills what a shorter one lacks with black or grey
_PNG_PIXELS = 8 * 1032  # of 1 bit, where deflate writes 1032 bytes as one
_JPEG_PIXELS = 8 * 64  # one bit for a block of 8 x 8 in a first scan of Huffman codes
_SCAN, _END, _EXIF = 0xDA, 0xD9, 0xE1
MARKER = re.compile(rb"\xff([^\x00\x01\xff\xd0-\xd8])", re.DOTALL)  # markers with a length, and the end
_PIXEL_CHUNKS = (b"IDAT", b"fdAT", b"fcTL")
_PACKED_CHUNKS = (b"iCCP", b"zTXt", b"iTXt")
_BIG = 43  # version number of BigTIFF
_MAX_OFFSET = 2**40  # behind the end of any file; seeking much further is a system error
_OFFSETS = (273, 324)  # TIFF tags: of strips, of tiles


class Unfit(Exception):
    """Error for an image that cannot be used; the text continues a sentence that begins with its name."""


def check_header(file: IO[bytes]) -> None:
    """Refuse an image file whose header takes far more time or memory to read than headers warrant.

    It reads only what precedes the pixels, and leaves the file at its start. Damage is left to the decoder to report.

    Raises:
        Unfit: if it has too many segments (JPEG), chunks (PNG), tags or blocks (TIFF).
    """
    file.seek(0)
    start = file.read(8)
    if start.startswith(b"\xff\xd8\xff"):
        _check_segments(file)
    elif start.startswith(b"\x89PNG"):
        _check_chunks(file, stop=(b"IDAT", b"fdAT", b"IEND"))
    elif start.startswith((b"II", b"MM")):
        check_pages(file)
    file.seek(0)


def check_pages(file: IO[bytes]) -> None:
    """Refuse a TIFF file with too many pages, or whose pages have too many tags or blocks.

    Raises:
        Unfit: if it has, or a tag is longer than the file.
    """
    size = file.seek(0, io.SEEK_END)
    order, is_big = _find_directory(file)
    offset = file.tell()
    offsets: set[int] = set()
    tags = 0
    while offset and offset not in offsets:  # pages that lead back to an earlier one end there
        offsets.add(offset)
        count = count_tags(file, offset)
        tags += count
        if count > MAX_TAGS:
            raise Unfit(f"has {count} TIFF tags; the limit is {MAX_TAGS}. Save it again")
        if len(offsets) > MAX_PAGES or tags > MAX_PAGE_TAGS:
            raise Unfit(f"has over {MAX_PAGES} pages, or {MAX_PAGE_TAGS} TIFF tags in its pages. Split it")
        for number, values in read_tags(file, offset):
            if number in _OFFSETS and values > MAX_BLOCKS:
                raise Unfit(f"has {values} TIFF blocks; the limit is {MAX_BLOCKS}. Save it with larger ones")
            if values > size:
                raise Unfit(f"is truncated: its TIFF tag {number} is longer than the file. Replace it")
        file.seek(offset + (8 + 20 * count if is_big else 2 + 12 * count))
        offset = min(int.from_bytes(file.read(8 if is_big else 4), order), _MAX_OFFSET)


def count_tags(file: IO[bytes], offset: int | None = None) -> int:
    """Return how many tags a directory of a TIFF file, or of EXIF, announces; 0 if it is truncated.

    Args:
        file: the file.
        offset: of the directory; None: of the first one.
    """
    order, is_big = _find_directory(file, offset)
    head = file.read(8 if is_big else 2)
    return int.from_bytes(head, order)


def check_cost(image: Image.Image) -> None:
    """Refuse an opened image that takes far more time or memory to decode than its size warrants.

    Raises:
        Unfit: if its file has too many scans, segments or chunks, or fewer bytes than any file of its size.
        OSError: if a part of a PNG file is longer than the file.
    """
    if not isinstance(image, ImageFile) or image.fp is None or image.fp.closed or not image.tile:
        return  # decoded already, or never a file
    position = image.fp.tell()
    if isinstance(image, JpegImageFile):
        _check_length(image, _JPEG_PIXELS)
        image.fp.seek(0)
        check_scans(image.fp.read())
    elif isinstance(image, PngImageFile):
        _check_length(image, _PNG_PIXELS // (1 if image.mode in ("1", "P", "L") else 8))
        end = _check_chunks(image.fp, stop=(b"IEND",))  # Pillow also reads those behind the pixels
        if end > image.fp.seek(0, io.SEEK_END):  # OpenCV reserves the memory
            raise OSError("a PNG chunk is longer than the file")
    image.fp.seek(position)


def _check_length(image: ImageFile, most_pixels: int) -> None:
    """Raise if a file has more pixels per byte than its format can store."""
    assert image.fp is not None
    length = image.fp.seek(0, io.SEEK_END)
    if image.width * image.height > most_pixels * length:
        raise Unfit(
            f"has {length} bytes, too few for {image.width} x {image.height} pixels: it is truncated. Replace it"
        )


def check_scans(data: bytes) -> None:
    """Refuse a JPEG file of too many scans: each is a pass over all pixels.

    Raises:
        Unfit: if it has.
    """
    scans = count_scans(data)
    if scans > MAX_SCANS:
        raise Unfit(f"has {scans} JPEG scans; the limit is {MAX_SCANS}. Save it again")


def count_scans(data: bytes) -> int:
    """Return the number of scans of the first image of a JPEG file; exact only above `MAX_SCANS`.

    Raises:
        Unfit: if it has too many segments between its scans.
    """
    found = data.count(b"\xff\xda")
    if found <= MAX_SCANS:
        return found
    scans, segments, position = 0, 0, 2
    while (match := MARKER.search(data, position)) and match[1][0] != _END:
        scans += match[1][0] == _SCAN
        segments += match[1][0] != _SCAN
        if segments > MAX_SEGMENTS:
            raise Unfit(f"has over {MAX_SEGMENTS} JPEG segments. Save it again")
        position = match.end() + int.from_bytes(data[match.end() : match.end() + 2], "big")
    return scans


def _check_segments(file: IO[bytes]) -> None:
    """Raise if the segments before the first scan are too many, as Pillow finds them."""
    segments, of_exif, fill, position = 0, 0, 0, 2
    while True:
        file.seek(position)
        head = file.read(10)
        marker = int.from_bytes(head[:2], "big")
        if head[:1] != b"\xff" or marker in (0xFF00, 0xFFFF):
            if not head:
                return
            fill += 1
            position += 1
        elif marker not in JPEG_MARKERS or head[1] == _SCAN:
            return
        else:
            segments += 1
            of_exif += head[1] == _EXIF and head[4:] == b"Exif\0\0"
            has_length = JPEG_MARKERS[marker][2] is not None
            position += 2 + (max(2, int.from_bytes(head[2:4], "big")) if has_length else 0)
        for count, most, what in (
            (segments, MAX_SEGMENTS, "JPEG segments"),
            (of_exif, MAX_EXIF_SEGMENTS, "JPEG segments of EXIF"),
            (fill, MAX_FILL, "bytes between its JPEG segments"),
        ):
            if count > most:
                raise Unfit(f"has over {most} {what}. Save it again")


def _check_chunks(file: IO[bytes], stop: tuple[bytes, ...]) -> int:
    """Return where the chunks of a PNG file end, up to the first of some names, and raise if they are too many."""
    chunks, packed, position = 0, 0, 8
    while True:
        file.seek(position)
        head = file.read(8)
        name = head[4:]
        if len(head) < 8 or name in stop:
            return position
        chunks += name not in _PIXEL_CHUNKS
        packed += name in _PACKED_CHUNKS
        if chunks > MAX_CHUNKS:
            raise Unfit(f"has over {MAX_CHUNKS} PNG chunks. Save it again")
        if packed > MAX_PACKED_CHUNKS:
            raise Unfit(f"has over {MAX_PACKED_CHUNKS} compressed PNG chunks of text or profiles. Save it again")
        position += 12 + int.from_bytes(head[:4], "big")


def read_tags(file: IO[bytes], offset: int | None = None) -> list[tuple[int, int]]:
    """Return number and count of values of each tag of a directory, by default the first, at most `MAX_TAGS`."""
    count = min(count_tags(file, offset), MAX_TAGS)
    order, is_big = _find_directory(file, offset)
    file.seek(8 if is_big else 2, 1)
    form = struct.Struct(("<" if order == "little" else ">") + ("H2xQ8x" if is_big else "H2xI4x"))
    entries = file.read(count * form.size)
    return list(form.iter_unpack(entries[: len(entries) // form.size * form.size]))


def _find_directory(file: IO[bytes], offset: int | None = None) -> tuple[Literal["little", "big"], bool]:
    """Seek to a TIFF's directory, by default the first; return byte order and whether it is a BigTIFF."""
    file.seek(0)
    head = file.read(16)
    order: Literal["little", "big"] = "little" if head.startswith(b"II") else "big"
    is_big = int.from_bytes(head[2:4], order) == _BIG
    first = int.from_bytes(head[8:16] if is_big else head[4:8], order)
    file.seek(min(first if offset is None else offset, _MAX_OFFSET))
    return order, is_big
