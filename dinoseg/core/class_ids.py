"""Class ids of a grid of scores: what it scores highest at each pixel, without the scores of all pixels."""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dinoseg.core.geometry import cell_weights, upsample
from dinoseg.utils.precision import at_least_float32
from dinoseg.utils.threads import threads

_BAND = 2**17  # scores of a grid looked at together
_AT_ONCE = 2**17  # upsampled numbers held at a time: what stays in a core's cache
_SMALL = 2**19  # of an image: less is upsampled as a whole before the other ways have begun
_LAUNCHED = 2**26  # the same on an accelerator, where an operation takes its time to start
# what things take beside an upsampled number of some classes, measured: a class that can win in a cell, any other, and
# a number of all pixels, class by class
_PAIR, _LOOK, _PIXEL = 25, 5, 0.65
_SAMPLE = 48  # rows and columns of cells by which it is chosen
_ROUNDING = 10  # times the type's epsilon and the largest score: 8 by which two sums of four cells can differ, and room


def highest(scores: Tensor) -> Tensor:
    """Return the ids (B, H, W) uint8 of the highest of (B, K, H, W) scores, of equal ones the first."""
    # the indices of max are those of argmax, which takes 6 times as long on a CPU
    return scores.max(dim=1).indices.to(torch.uint8)


@torch.no_grad()
def class_ids(scores: Tensor, size: tuple[int, int], valid: tuple[float, float]) -> Tensor:
    """Return the ids (B, H, W) uint8 of the classes that `upsample` of finite (B, K, h, w) scores highest.

    Of classes that score the same, it is the first; of those that differ by no more than rounding, any. It takes a few
    numbers a pixel, however many classes there are. A score between four cells lies between theirs: on a CPU, a class
    is upsampled only where it can win, and nothing is where one class alone can, if that takes less time.
    """
    scores = at_least_float32(scores)
    if scores.device.type != "cpu":
        small = scores.shape[0] * scores.shape[1] * math.prod(size) <= _LAUNCHED
        return highest(upsample(scores, size, valid)) if small else _one_by_one(scores, size, valid)
    return torch.cat([_of_image(grid[None], size, valid) for grid in scores])


def _of_image(scores: Tensor, size: tuple[int, int], valid: tuple[float, float]) -> Tensor:
    """Return the ids (1, H, W) of one image's scores (1, K, h, w) on a CPU, the way that takes less time."""
    grid = scores[0]
    if len(grid) * math.prod(size) <= _SMALL:
        return highest(upsample(scores, size, valid))
    slack = _ROUNDING * torch.finfo(grid.dtype).eps * max(map(abs, map(float, grid.aminmax())))
    rows, columns = (
        _cells(length, cells, share, grid.dtype)
        for length, cells, share in zip(size, grid.shape[1:], valid, strict=True)
    )
    if not math.isfinite(slack) or not _pays(grid, rows, columns, slack):
        return _one_by_one(scores, size, valid)
    at_once = max(1, _BAND // (len(grid) * len(columns.low)))
    bands = [slice(start, start + at_once) for start in range(0, len(rows.low), at_once)]
    with torch.autocast("cpu", enabled=False), threads(grid.device) as each:
        return torch.cat(list(each(functools.partial(_band_ids, grid, rows, columns, slack), bands)))[None]


def _one_by_one(scores: Tensor, size: tuple[int, int], valid: tuple[float, float]) -> Tensor:
    """Return the best ids (B, H, W) of classes that are upsampled one by one."""
    best = upsample(scores[:, :1], size, valid)[:, 0].clone()
    ids = torch.zeros_like(best, dtype=torch.uint8)
    for label in range(1, scores.shape[1]):
        pixels = upsample(scores[:, label : label + 1], size, valid)[:, 0]
        better = (pixels > best).to(torch.uint8)
        torch.maximum(ids, better.mul_(label), out=ids)  # ascending: each is greater than all before
        torch.maximum(best, pixels, out=best)
    return ids


class _Cells(NamedTuple):
    """The spaces between neighbours on an axis of a grid: N that hold a pixel, none more than P."""

    low: Tensor  # (N,) where on the grid each begins
    high: Tensor  # (N,) and where it ends
    owner: Tensor  # (pixels,) in which of them each pixel lies
    pixels: Tensor  # (N, P) which pixels lie in each, the last of them again where they are fewer than P
    weights: Tensor  # (2, N, P) what these read of where it begins, and where it ends


@functools.lru_cache(maxsize=16)
def _cells(length: int, cells: int, share: float, dtype: torch.dtype) -> _Cells:
    """Return the cells between `length` pixels' neighbours."""
    low, weights = cell_weights(length, cells, share, dtype)
    begins, owner, counts = low.unique_consecutive(return_inverse=True, return_counts=True)
    offsets = torch.arange(int(counts.max())).minimum(counts[:, None] - 1)  # (N, P)
    pixels = (counts.cumsum(0) - counts)[:, None] + offsets
    return _Cells(begins.clamp(min=0), (begins + 1).clamp(max=cells - 1), owner, pixels, weights[:, pixels])


def _pays(grid: Tensor, rows: _Cells, columns: _Cells, slack: float) -> bool:
    """Return whether to look at cells, of which some are sampled, takes less than to upsample all classes."""
    cells, pixels = len(rows.low) * len(columns.low), len(rows.owner) * len(columns.owner)
    if _LOOK * cells >= _PIXEL * pixels:
        return False
    down, along = ([end[:: -(-len(axis.low) // _SAMPLE)] for end in (axis.low, axis.high)] for axis in (rows, columns))
    able = _able(grid, down, along, slack)[0]
    counts = able.sum(1)
    pairs = float(counts[counts > 1].sum()) / len(able)  # of a cell
    side = rows.pixels.shape[1] * columns.pixels.shape[1]
    return cells * (pairs * (_PAIR + side) + len(grid) * _LOOK) < _PIXEL * len(grid) * pixels


def _able(grid: Tensor, down: Sequence[Tensor], along: Sequence[Tensor], slack: float) -> tuple[Tensor, Tensor]:
    """Return which classes can win in cells (N, K), and what is the most that they score there (K, N)."""
    most, least = (
        pick(*(pick(*(grid.index_select(1, end) for end in down)).index_select(2, end) for end in along)).flatten(1)
        for pick in (torch.maximum, torch.minimum)
    )
    return (most >= least.amax(0) - slack).T.contiguous(), most


@torch.no_grad()  # a thread has a mode of its own
def _band_ids(grid: Tensor, rows: _Cells, columns: _Cells, slack: float, band: slice) -> Tensor:
    """Return the ids (r, W) of some rows of cells of a grid (K, h, w)."""
    able, most = _able(grid, [end[band] for end in rows[:2]], columns[:2], slack)
    winners = most.max(0).indices.to(torch.uint8).view(-1, len(columns.low))
    owner = rows.owner[(rows.owner >= band.start) & (rows.owner < band.stop)]
    pixels = rows.pixels - rows.pixels[band.start, 0]
    ids = winners.index_select(1, columns.owner).index_select(0, owner - band.start)
    counts, side = able.sum(1), rows.pixels.shape[1] * columns.pixels.shape[1]
    for count in counts.unique().tolist():
        if count == 1:
            continue
        for places in (counts == count).nonzero()[:, 0].split(max(1, _AT_ONCE // (count * side))):
            labels = able[places].nonzero()[:, 1].view(-1, count)  # ascending
            row, column = places // len(columns.low) + band.start, places % len(columns.low)
            ends = [low[row] * grid.shape[2] + along[column] for low in rows[:2] for along in columns[:2]]
            read = (labels * grid[0].numel())[:, :, None] + torch.stack(ends, dim=1)[:, None]
            corners = grid.flatten().index_select(0, read.flatten()).view(read.shape)  # (n, count, 4)
            best = _best(corners, rows.weights[:, row], columns.weights[:, column])
            found = labels.to(torch.uint8).gather(1, best.flatten(1)).view_as(best)
            ids[pixels[row][:, :, None], columns.pixels[column][:, None]] = found
    return ids


def _best(corners: Tensor, down: Tensor, along: Tensor) -> Tensor:
    """Return which of a few classes scores highest (n, p, q) between corners (n, k, 4)."""
    sides = corners.view(*corners.shape[:2], 2, 2, 1)  # of both rows, of both columns
    edges = sides[:, :, 0] * down[0][:, None, None] + sides[:, :, 1] * down[1][:, None, None]  # (n, k, 2, p)
    pixels = edges[:, :, 0, :, None] * along[0][:, None, None]
    pixels.addcmul_(edges[:, :, 1, :, None], along[1][:, None, None])  # (n, k, p, q)
    return pixels.max(1).indices
