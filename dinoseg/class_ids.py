"""Class ids of a grid of scores: what it scores highest at each pixel, without the scores of all pixels."""

import math
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dinoseg.geometry import upsample
from dinoseg.precision import at_least_float32

_TILE = (32, 128)  # pixels: what a few classes score there stays in a core's cache
_LEAST_CELL = 6  # pixels along a cell of the grid; between smaller ones too many tiles hold many classes
_AT_ONCE = 2**26  # upsampled numbers held at a time on an accelerator, where an operation takes its time to start
_ROUNDING = 10  # times the type's epsilon and the largest score: 8 by which two sums of four cells can differ, and room


def highest(scores: Tensor) -> Tensor:
    """Return the ids (B, H, W) uint8 of the highest of (B, K, H, W) scores, of equal ones the first."""
    # the indices of max are those of argmax, which takes 6 times as long on a CPU
    return scores.max(dim=1).indices.to(torch.uint8)


@torch.no_grad()
def class_ids(scores: Tensor, size: tuple[int, int], valid: tuple[float, float]) -> Tensor:
    """Return the ids (B, H, W) uint8 of the classes that `upsample` of finite (B, K, h, w) scores highest, to the bit.

    Of classes that score the same, it is the first. It takes a few numbers a pixel, however many classes there are.
    A score between four cells lies between theirs: on a CPU only classes are upsampled, a tile at a time, that can win
    between some of its cells, and where two are as close as rounding, `upsample` itself decides.
    """
    scores = at_least_float32(scores).contiguous()  # of another layout `upsample` rounds otherwise
    on_cpu = scores.device.type == "cpu"
    if not on_cpu and scores.shape[0] * scores.shape[1] * math.prod(size) <= _AT_ONCE:
        return highest(upsample(scores, size, valid))
    cell = min(pixels / (cells * share) for pixels, cells, share in zip(size, scores.shape[2:], valid, strict=True))
    if not on_cpu or cell < _LEAST_CELL:
        return _compared(scores, range(scores.shape[1]), size, valid)
    with torch.autocast("cpu", enabled=False):  # which would multiply in half precision
        return torch.stack([_by_tiles(grid, size, valid) for grid in scores])


def _compared(
    scores: Tensor,
    classes: Iterable[int],
    size: tuple[int, int],
    valid: tuple[float, float],
    where: Tensor | None = None,
) -> Tensor:
    """Return the best ids of some classes, ascending, which are upsampled one by one: (B, H, W), or some of them.

    Args:
        scores: (B, K, h, w).
        classes: that are compared.
        size: (H, W).
        valid: share of the grid.
        where: (P,) which pixels of all (B * H * W); None: all.
    """
    best = ids = torch.empty(0)
    for number, label in enumerate(classes):
        pixels = upsample(scores[:, label : label + 1], size, valid)[:, 0]
        pixels = pixels if where is None else pixels.flatten()[where]
        if number == 0:
            best, ids = pixels.clone(), torch.full(pixels.shape, label, dtype=torch.uint8, device=pixels.device)
            continue
        better = (pixels > best).to(torch.uint8)
        torch.maximum(ids, better.mul_(label), out=ids)  # ascending: each is greater than all before
        torch.maximum(best, pixels, out=best)
    return ids


def _by_tiles(grid: Tensor, size: tuple[int, int], valid: tuple[float, float]) -> Tensor:
    """Return the ids (H, W) of one image's scores (K, h, w)."""
    slack = _ROUNDING * torch.finfo(grid.dtype).eps * float(grid.abs().max())
    if not math.isfinite(slack):
        return _compared(grid[None], range(len(grid)), size, valid)[0]
    wins = _can_win(grid, slack)
    ids = torch.empty(size, dtype=torch.uint8)
    near, tied = torch.zeros(size, dtype=torch.bool), set[int]()
    columns = _runs(size[1], grid.shape[2], valid[1], _TILE[1], grid.dtype)
    for row in _runs(size[0], grid.shape[1], valid[0], _TILE[0], grid.dtype):
        band, below = grid[:, row.cells], np.any(wins[:, row.between], axis=1)
        for column in columns:
            tile = (row.pixels, column.pixels)
            able = np.flatnonzero(np.any(below[:, column.between], axis=1))
            if len(able) == 1:
                ids[tile] = int(able[0])
                continue
            labels = torch.from_numpy(able)
            pixels = row.weights @ (band[labels, :, column.cells] @ column.weights.T)  # (k, r, c)
            best, first = pixels.max(dim=0)
            ids[tile] = labels.to(torch.uint8)[first]
            close = pixels >= best - slack
            if torch.count_nonzero(close) > best.numel():
                near[tile] = several = close.sum(dim=0) > 1
                tied.update(able[close[:, several].any(dim=1).numpy()].tolist())
    if tied:
        where = near.flatten().nonzero()[:, 0]
        ids.view(-1)[where] = _compared(grid[None], sorted(tied), size, valid, where)
    return ids


def _can_win(grid: Tensor, slack: float) -> np.ndarray:
    """Return which classes (K, h, w) may score highest between a cell of (K, h, w), the next, and those below both."""
    highest = lowest = grid
    for axis in (1, 2):
        highest, lowest = (
            pick(part, torch.cat([part.narrow(axis, 1, part.shape[axis] - 1), part.narrow(axis, -1, 1)], dim=axis))
            for pick, part in ((torch.maximum, highest), (torch.minimum, lowest))
        )
    return (highest >= lowest.amax(dim=0) - slack).numpy()


class _Run(NamedTuple):
    """Pixels along an axis, and the cells that they lie between."""

    pixels: slice
    cells: slice
    weights: Tensor  # (pixels, cells)

    @property
    def between(self) -> slice:
        """The cells after which the pixels lie, or at which."""
        return slice(self.cells.start, max(self.cells.start + 1, self.cells.stop - 1))


@lru_cache(maxsize=16)
def _runs(length: int, cells: int, share: float, at_once: int, dtype: torch.dtype) -> list[_Run]:
    """Return an axis in runs of at most `at_once` pixels, with the weights that `upsample` itself has, to the bit."""
    units = torch.eye(cells, dtype=dtype)[None, :, :, None]  # (1, cells, cells, 1)
    weights = upsample(units, (length, 2), (share, 1.0))[0, :, :, 0].T.contiguous()  # (length, cells)
    found = []
    for start in range(0, length, at_once):
        run = weights[start : start + at_once]
        read = run.any(dim=0).nonzero()
        first, last = int(read[0]), int(read[-1]) + 1
        found.append(_Run(slice(start, start + len(run)), slice(first, last), run[:, first:last].contiguous()))
    return found
