"""Masks of objects as runs of pixels, column by column: areas and overlaps without decoding them; no torch."""

from collections.abc import Sequence
from typing import NamedTuple, Self

import numpy as np


class Runs(NamedTuple):
    """Runs of ones of a mask (H, W) whose columns follow one another, as in COCO's run lengths.

    Attributes:
        starts: (R,) int64, first pixel of each run, ascending.
        ends: (R,) int64, the pixel after each run; runs do not overlap, and may be empty.
    """

    starts: np.ndarray
    ends: np.ndarray

    @classmethod
    def of_mask(cls, mask: np.ndarray) -> Self:
        """Return the runs of a mask (H, W) bool."""
        flat = np.zeros(mask.size + 2, bool)  # a zero on each side, so that runs at the border change too
        flat[1:-1] = mask.T.ravel()
        changes = np.flatnonzero(flat[1:] != flat[:-1])
        return cls(changes[::2], changes[1::2])

    @classmethod
    def of_counts(cls, counts: np.ndarray) -> Self:
        """Return the runs of run lengths (N,), of zeros first."""
        bounds = np.cumsum(counts)
        ends = bounds[1::2]
        return cls(bounds[::2][: len(ends)], ends)

    @property
    def area(self) -> int:
        """Number of pixels."""
        return int((self.ends - self.starts).sum())

    def paint(self, canvas: np.ndarray, value: object) -> None:
        """Set the pixels of a canvas (H, W) where the mask is 1."""
        rows, places = len(canvas), self.pixels()
        canvas[places % rows, places // rows] = value

    def pixels(self) -> np.ndarray:
        """Return the pixels (P,) int64 where the mask is 1, counted column by column."""
        lengths = self.ends - self.starts
        before = np.cumsum(lengths) - lengths
        return np.arange(lengths.sum()) + np.repeat(self.starts - before, lengths)

    def to_mask(self, size: tuple[int, int]) -> np.ndarray:
        """Return the mask (H, W) bool of `size` (H, W)."""
        flat = np.zeros(size[0] * size[1], bool)
        flat[self.pixels()] = True
        return flat.reshape(size[1], size[0]).T


def overlaps(first: Sequence[Runs], second: Sequence[Runs]) -> np.ndarray:
    """Return the common pixels (D, G) int64 of each of D masks with each of G masks of the same image."""
    owners = np.repeat(np.arange(len(first)), [len(runs.starts) for runs in first])
    starts = np.concatenate([np.empty(0, np.int64), *(runs.starts for runs in first)])
    ends = np.concatenate([np.empty(0, np.int64), *(runs.ends for runs in first)])
    found = np.zeros((len(first), len(second)), np.int64)
    for column, runs in enumerate(second):
        common = _count_before(runs, ends) - _count_before(runs, starts)
        np.add.at(found[:, column], owners, common)
    return found


def _count_before(runs: Runs, places: np.ndarray) -> np.ndarray:
    """Return how many ones of a mask lie before each place (M,)."""
    begun = np.searchsorted(runs.starts, places, side="right")  # runs that start before or at the place
    pixels = np.concatenate([[0], np.cumsum(runs.ends - runs.starts)])
    last_end = np.concatenate([[0], runs.ends])[begun]
    return pixels[begun] - np.maximum(last_end - places, 0)
