"""Check that a JPEG file holds data for all its pixels: decoders fill missing pixels without an error."""

import re
from collections.abc import Callable, Iterator

import numpy as np

from dinoseg.utils.errors import Unfit

_SCAN, _END = 0xDA, 0xD9  # JPEG markers
_MARKER = re.compile(rb"\xff([^\x00\x01\xff\xd0-\xd8])", re.DOTALL)  # markers with a length, and the end
_FRAMES = (0xC0, 0xC1, 0xC2, 0xC9, 0xCA)  # JPEG markers of a header with sizes: baseline, extended, progressive
_COEFFICIENTS = 64  # of a JPEG block
_GREY, _SLACK = 128, 2  # level of a JPEG block without data, and how far upsampled colours move it
_FILLER = b"\x5a" * 64  # codes of any Huffman table, which no decoder reads after the last pixel


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
