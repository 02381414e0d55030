"""Thinning of class masks to skeletons of one pixel in width, for all classes at once; no torch."""

import numpy as np

from dinoseg.metrics.surface import neighbour_edges

_RING = ((-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1))  # rows and columns, clockwise from above


def thin_masks(ids: np.ndarray, background: int) -> np.ndarray:
    """Return a map (H, W) with the skeleton of each id, and `background` elsewhere (Guo and Hall, 1989).

    Their parallel algorithm A1, until no pixel can be removed: it keeps each 8-connected part of a mask, as one pixel
    at least. The cost is proportional to the area of the masks.

    Args:
        ids: (H, W), of any integer type that holds `background`.
        background: id of the pixels outside all masks.
    """
    padded = np.pad(ids, 1, constant_values=background)
    around = np.array([row * padded.shape[1] + column for row, column in _RING])
    edges = np.flatnonzero(neighbour_edges(padded))
    flat = padded.reshape(-1)
    last = np.empty(len(flat), np.intp)  # place of a pixel among the candidates
    # a pixel can only become removable after its neighbourhood has changed in one of the last two steps
    older = newer = edges
    step = 0
    while len(older) or len(newer):
        candidates = np.concatenate((older, newer))
        candidates = candidates[flat[candidates] != background]
        numbers = np.arange(len(candidates))
        # of equal pixels the last one is stored: duplicates go without sorting
        last[candidates] = numbers
        candidates = candidates[last[candidates] == numbers]  # each once
        same = flat[candidates[:, None] + around] == flat[candidates, None]  # (N, 8)
        removed = candidates[_REMOVABLE[step % 2, np.packbits(same, axis=1, bitorder="little")[:, 0]]]
        older = newer
        # tested again are the neighbours of removed pixels alone: 0.7 s instead of 10 for 1024 x 2048
        # (docs/decisions.md)
        newer = (removed[:, None] + around).reshape(-1)
        flat[removed] = background
        step += 1
    return padded[1:-1, 1:-1]


def _make_removal_table() -> np.ndarray:
    """Return whether a pixel is removed in even and in odd steps, (2, 256), by the bits of its neighbours."""
    ring = (np.arange(256)[:, None] >> np.arange(8) & 1).astype(bool)
    sides, corners = ring[:, ::2], ring[:, 1::2]
    # C(p) of the paper, the 8-connected parts among the neighbours: with one, removing the pixel cuts nothing
    parts = (~sides & (corners | np.roll(sides, -1, axis=1))).sum(1)
    # N(p) = min(N1, N2): below 2 the pixel is the end of a line, above 3 it is not at the border of the mask
    pairs = np.minimum((sides | corners).sum(1), (sides | np.roll(corners, 1, axis=1)).sum(1))
    north, northeast, east, southeast, south, southwest, west, northwest = ring.T
    # odd and even steps take pixels from opposite sides: both at once would erase lines of two pixels
    kept = np.stack(((north | northeast | ~southeast) & east, (south | southwest | ~northwest) & west))
    return (parts == 1) & (pairs >= 2) & (pairs <= 3) & ~kept


_REMOVABLE = _make_removal_table()
