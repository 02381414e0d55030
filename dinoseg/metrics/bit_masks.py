"""Masks as one bit per pixel: what they share, their boundaries, and what lies near these, 64 pixels at a time."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import isqrt

import cv2
import numpy as np

_WORD = np.dtype("<u8")  # 64 pixels of a row; the lowest bit is the leftmost
_BITS = 64
_COUNTED = 2**27  # bytes that OpenCV counts in one call, since it adds their bits up in a signed 32-bit integer
_AT_ONCE = 2**16  # bytes of masks that are worked on together: they stay in the processor's cache


@dataclass(frozen=True)
class Rows:
    """Some rows of a mask as bits: (h, words) from row `top` on, which may lie above the image; others are empty."""

    top: int
    words: np.ndarray

    def shared(self, other: "Rows") -> int:
        """Return the number of pixels that both hold."""
        top = max(self.top, other.top)
        bottom = min(self.top + len(self.words), other.top + len(other.words))
        if bottom <= top:
            return 0
        return _count(
            self.words[top - self.top : bottom - self.top] & other.words[top - other.top : bottom - other.top]
        )


@dataclass(frozen=True)
class Mask:
    """A mask, its boundary, and what lies within the tolerance of its boundary; with the pixels of the first two."""

    inside: Rows
    edge: Rows
    near: Rows
    size: int
    edge_size: int


class Frame:
    """How the masks of frames of one size are held: all with rows of as many words.

    Every row ends with `radius` or more empty pixels: what is shifted out of one row does not reach the next one.

    Args:
        size: (H, W).
        radius: distance in pixels, itself included, within which a pixel is near a boundary.
    """

    def __init__(self, size: tuple[int, ...], radius: int) -> None:
        self.height, self.width = size
        self.radius = radius
        self.words = -(-(self.width + self.radius) // _BITS)
        plane = self.height * self.words * _WORD.itemsize
        self.at_once = max(_AT_ONCE // max(plane, 1), 1)
        self._has_right = _packed(np.arange(self.words * _BITS) < self.width - 1)

    def masks(self, maps: Sequence[tuple[np.ndarray, range]]) -> list[list[Mask]]:
        """Return the masks of some labels of each map of ids (H, W)."""
        bits = np.concatenate([self._bits(ids, labels) for ids, labels in maps])
        steps = range(0, len(bits), self.at_once)
        masks = [mask for start in steps for mask in self._masks(bits[start : start + self.at_once])]
        ends = list(accumulate(len(labels) for _, labels in maps))
        return [masks[end - len(labels) : end] for end, (_, labels) in zip(ends, maps, strict=True)]

    def _bits(self, ids: np.ndarray, labels: range) -> np.ndarray:
        """Return each label's mask (n, H, words)."""
        held = np.zeros((len(labels), self.height, self.words * _WORD.itemsize), dtype=np.uint8)
        rows = max(_AT_ONCE // max(self.width, 1), 1)
        for plane, label in zip(held, labels, strict=True):
            for top in range(0, self.height, rows):
                packed = np.packbits(ids[top : top + rows] == label, axis=1, bitorder="little")
                plane[top : top + rows, : packed.shape[1]] = packed
        return held.view(_WORD)

    def _masks(self, bits: np.ndarray) -> list[Mask]:
        """Describe masks by their rows and one more above, which keeps their whole boundary.

        They are widened one below the other, each with `radius` empty rows above and below.
        """
        edges = _edges(bits, self._has_right)
        spans = [_span(rows.tobytes()) for rows in np.asarray(bits.any(axis=2))]
        heights = [bottom - top + 2 * self.radius for top, bottom in spans]
        starts = list(accumulate(heights, initial=0))
        column = np.zeros((starts[-1], self.words), dtype=_WORD)
        for edge, (top, bottom), start in zip(edges, spans, starts, strict=False):
            column[start + self.radius :][: bottom - top] = edge[top:bottom]
        near = _widened(column, self.radius)
        return [
            Mask(
                Rows(top, inside[top:bottom]),
                Rows(top, edge[top:bottom]),
                Rows(top - self.radius, near[start : start + height]),
                _count(inside[top:bottom]),
                _count(edge[top:bottom]),
            )
            for inside, edge, (top, bottom), start, height in zip(bits, edges, spans, starts, heights, strict=False)
        ]


def _packed(pixels: np.ndarray) -> np.ndarray:
    return np.packbits(pixels, bitorder="little").view(_WORD)


def _span(rows: bytes) -> tuple[int, int]:
    """Return the row above the first one that holds a pixel, and the end of the last one; 0, 0 for none."""
    return max(rows.find(1) - 1, 0), rows.rfind(1) + 1


def _edges(bits: np.ndarray, has_right: np.ndarray) -> np.ndarray:
    """Return the pixels (n, H, words) that differ from their right, lower or lower-right neighbour in the image."""
    flat = bits.reshape(-1)
    right = flat >> 1
    right[:-1] |= flat[1:] << (_BITS - 1)
    right = right.reshape(bits.shape)
    edges = bits ^ right
    edges[:, :-1] |= bits[:, :-1] ^ right[:, 1:]
    edges &= has_right
    edges[:, :-1] |= bits[:, :-1] ^ bits[:, 1:]
    return edges


def _widened(bits: np.ndarray, radius: int) -> np.ndarray:
    """Return the union of disks around all pixels of (h, words), whose `radius` outermost rows are empty.

    A disk is a run of pixels for each of its rows: runs grow from its ends to its middle.
    """
    runs, near, reach = bits.copy(), bits.copy(), 0
    for row in range(radius, -1, -1):
        half = isqrt(radius**2 - row**2)
        while reach < half:
            step = min(half - reach, 2 * reach + 1, _BITS - 1)  # a longer one would leave gaps
            _grow(runs.reshape(-1), step)
            reach += step
        near[row:] |= runs[: len(runs) - row]
        near[: len(runs) - row] |= runs[row:]
    return near


def _grow(flat: np.ndarray, step: int) -> None:
    """Add to every pixel of a flat image those `step` to the left and to the right, at most 63."""
    ahead, behind = flat << step, flat >> step
    ahead[1:] |= flat[:-1] >> (_BITS - step)
    behind[:-1] |= flat[1:] << (_BITS - step)
    flat |= ahead
    flat |= behind


def _count(words: np.ndarray) -> int:
    """Return the number of bits that are set."""
    flat = words.reshape(-1).view(np.uint8)
    return sum(
        int(cv2.norm(flat[start : start + _COUNTED], cv2.NORM_HAMMING)) for start in range(0, len(flat), _COUNTED)
    )
