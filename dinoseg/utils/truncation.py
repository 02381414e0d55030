"""Checks that a PNG or JPEG file holds data for all its pixels: decoders fill missing pixels without an error."""

import re
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import IO

import numpy as np

from dinoseg.utils.errors import Unfit

_SCAN, _END = 0xDA, 0xD9  # JPEG markers
_MARKER = re.compile(rb"\xff([^\x00\x01\xff\xd0-\xd8])", re.DOTALL)  # markers with a length, and the end
_FRAMES = (0xC0, 0xC1, 0xC2, 0xC9, 0xCA)  # JPEG markers of a header with sizes: baseline, extended, progressive
_COEFFICIENTS = 64  # of a JPEG block
_GREY, _SLACK = 128, 2  # level of a JPEG block without data, and how far upsampled colours move it
_FILLER = b"\x5a" * 64  # codes of any Huffman table, which no decoder reads after the last pixel
_PIECE = 2**20  # bytes that are inflated at once
_PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))  # of PNG
_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # channels by PNG's colour type


def check_jpeg(data: bytes, pixels: np.ndarray, decode: Callable[[bytes], np.ndarray]) -> None:
    """Refuse a JPEG file that ends before its last pixel, though it has an end marker.

    A decoder makes missing blocks grey. If the last pixels are grey, the file is decoded again with bytes before its
    end marker: they change the pixels only if the decoder needs them. Missing scans are found by their headers. Two
    cuts are not found: within the last 16 x 16 pixels, and within the last scan of a progressive file, which adds the
    lowest bits.

    Args:
        data: the file.
        pixels: its pixels (H, W) or (H, W, C).
        decode: returns the pixels of such a file.

    Raises:
        Unfit: it is truncated.
    """
    if not _has_all_scans(data):
        raise Unfit("lacks some of its JPEG scans: it is truncated. Replace it")
    corner = pixels[-2:, -2:].astype(float).reshape(min(2, len(pixels)), -1, pixels.shape[2] if pixels.ndim > 2 else 1)
    weights = (0.299, 0.587, 0.114) if corner.shape[2] == 3 else np.full(corner.shape[2], 1 / corner.shape[2])
    if (abs(corner @ weights - _GREY) > _SLACK).any():
        return
    end = next((start for marker, start, _ in _segments(data) if marker == _END), None)
    if end is not None and not np.array_equal(decode(data[:end] + _FILLER + data[end:]), pixels):
        raise Unfit("has JPEG data for only a part of its pixels: it is truncated. Replace it")


def find_jpeg_size(data: bytes) -> tuple[int, int]:
    """Return height and width that the header of a JPEG file states; (0, 0) if it states none."""
    for marker, _, content in _segments(data):
        if marker in _FRAMES and len(content) >= 5:
            return int.from_bytes(content[1:3], "big"), int.from_bytes(content[3:5], "big")
        if marker == _SCAN:
            break
    return 0, 0


def check_png(file: IO[bytes], last_row: np.ndarray) -> None:
    """Refuse a PNG file of fewer pixels than its header states.

    A decoder makes missing rows black: a file whose last row is not needs no check, unless it is interlaced.

    Args:
        file: the file.
        last_row: the last row of its pixels.

    Raises:
        Unfit: it is truncated.
    """
    file.seek(16)
    width, height, bits, kind, _, _, interlaced = struct.unpack(">IIBBBBB", file.read(13))
    if last_row.any() and not interlaced:
        return
    per_pixel = bits * _SAMPLES.get(kind, 4)
    needed = 0
    for left, top, across, down in _PASSES if interlaced else ((0, 0, 1, 1),):
        columns, rows = -((left - width) // across), -((top - height) // down)
        needed += rows * (1 + -(-columns * per_pixel // 8)) if columns else 0
    found = _count_inflated(file, needed)
    if found < needed:
        raise Unfit(f"has {found} of the {needed} bytes of its pixels: it is truncated. Replace it")


def _count_inflated(file: IO[bytes], most: int) -> int:
    """Return how many bytes the IDAT chunks hold, decompressed, up to about `most`; they are not stored."""
    inflate, found, position = zlib.decompressobj(), 0, 8
    while found < most and not inflate.eof:
        file.seek(position)
        head = file.read(8)
        if len(head) < 8 or head[4:] == b"IEND":
            break
        length = int.from_bytes(head[:4], "big")
        position += 12 + length
        data = file.read(length) if head[4:] == b"IDAT" else b""
        while data and found < most and not inflate.eof:
            found += len(inflate.decompress(data, _PIECE))
            data = inflate.unconsumed_tail
    return found


def _segments(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Yield marker, position and content of each segment of the first image of a JPEG file, up to its end."""
    position = 2
    while match := _MARKER.search(data, position):
        start = match.end()
        length = int.from_bytes(data[start : start + 2], "big")
        yield match[1][0], match.start(), data[start + 2 : start + length]
        if match[1][0] == _END:
            return
        position = start + length


def _has_all_scans(data: bytes) -> bool:
    """Return whether the scans bring all coefficients of all components to full precision."""
    missing: dict[int, np.ndarray] = {}  # component to bits that each coefficient lacks
    for marker, _, content in _segments(data):
        if marker in _FRAMES:
            components = content[6 : 6 + 3 * content[5] : 3] if len(content) > 5 else b""
            missing = {component: np.ones(_COEFFICIENTS) for component in components}
        elif marker == _SCAN and len(content) > 2 * content[0] + 3:
            first, last, bits = content[2 * content[0] + 1 : 2 * content[0] + 4]
            for component in content[1 : 2 * content[0] + 1 : 2]:
                if component in missing:
                    missing[component][first : last + 1] = bits & 15
        if marker == _SCAN and not any(lacking.any() for lacking in missing.values()):
            return True  # without a look at the entropy-coded data of a single scan
    return not missing
