"""Class IDs from a grid of scores: the highest class at each pixel, without upsampling all scores."""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dinoseg.core.geometry import Span, cell_weights, spans, upsample, upsample_tile
from dinoseg.utils.devices import threads
from dinoseg.utils.precision import at_least_float32

_BAND = 2**17  # scores of a grid processed at once
_AT_ONCE = 2**17  # upsampled numbers held at a time, to stay in a core's cache
_SMALL = 2**19  # upsampled numbers of an image, below which upsampling all is fastest
_LAUNCHED = 2**26  # upsampled numbers at once on an accelerator (256 MiB), where kernel launches take time
# measured costs, relative to one upsampled number in the method by cells
_PAIR_COST = 25  # of a class that can win in a cell
_CELL_COST = 5  # of any class in a cell
_PIXEL_COST = 0.65  # of one upsampled number if all pixels are upsampled class by class
_SAMPLE = 48  # rows and columns of cells sampled to choose the method
_ROUNDING = 10  # times epsilon and the largest score: two sums of four cells differ by at most 8; the rest is margin

_ROWS = 32  # of a tile
_CACHED = 2**18  # numbers of a tile
_MIXED_LAUNCHED = 2**25  # on an accelerator, where kernel launches take time
_LEFT_OUT = 2**-5  # maximum of a class's score that the masks skipped in a tile may add up to
_SINGLE = 12  # cost of a mask at a single pixel, relative to a pixel of a whole tile


def argmax_ids(scores: Tensor) -> Tensor:
    """Return the IDs (B, H, W) uint8 of the highest of (B, K, H, W) scores; ties go to the first."""
    # same indices as argmax, which takes 6 times as long on a CPU
    return scores.max(dim=1).indices.to(torch.uint8)


@torch.no_grad()
def class_ids(scores: Tensor, size: tuple[int, int], valid: tuple[float, float]) -> Tensor:
    """Return the IDs (B, H, W) uint8 of the classes with the highest `upsample` of finite (B, K, h, w) scores.

    Ties go to the first class; scores that differ only by rounding may go to either. Memory is a few numbers per
    pixel, for any number of classes. A score between four cells lies between theirs. On a CPU, a class is thus
    upsampled only where it can win, and nothing where only one class can, if that is faster.
    """
    scores = at_least_float32(scores)
    if scores.device.type != "cpu":
        images = _LAUNCHED // (scores.shape[1] * math.prod(size))  # that fit at once
        if not images:
            return _one_by_one(scores, size, valid)
        return torch.cat([argmax_ids(upsample(some, size, valid)) for some in scores.split(images)])
    return torch.cat([_of_image(grid[None], size, valid) for grid in scores])


def _of_image(scores: Tensor, size: tuple[int, int], valid: tuple[float, float]) -> Tensor:
    """Return the IDs (1, H, W) of one image's scores (1, K, h, w) on a CPU, by the faster method."""
    grid = scores[0]
    if len(grid) * math.prod(size) <= _SMALL:
        return argmax_ids(upsample(scores, size, valid))
    slack = _ROUNDING * torch.finfo(grid.dtype).eps * max(map(abs, map(float, grid.aminmax())))
    rows, columns = (
        _cells(length, cells, share, grid.dtype)
        for length, cells, share in zip(size, grid.shape[1:], valid, strict=True)
    )
    # bounds say nothing about NaN or infinite scores; and where most cells are undecided, as in noise, they cost more
    # than they save
    if not math.isfinite(slack) or not _is_faster(grid, rows, columns, slack):
        return _one_by_one(scores, size, valid)
    at_once = max(1, _BAND // (len(grid) * len(columns.low)))
    bands = [slice(start, start + at_once) for start in range(0, len(rows.low), at_once)]
    with torch.autocast("cpu", enabled=False), threads(grid.device) as each:
        return torch.cat(list(each(functools.partial(_band_ids, grid, rows, columns, slack), bands)))[None]


def _one_by_one(scores: Tensor, size: tuple[int, int], valid: tuple[float, float]) -> Tensor:
    """Return the IDs (B, H, W) of the highest classes, which are upsampled one by one."""
    best = upsample(scores[:, :1], size, valid)[:, 0].clone()
    ids = torch.zeros_like(best, dtype=torch.uint8)
    for label in range(1, scores.shape[1]):
        pixels = upsample(scores[:, label : label + 1], size, valid)[:, 0]
        better = (pixels > best).to(torch.uint8)
        # labels ascend, so the newest one that is better is the maximum; this is a `where` without a copy
        torch.maximum(ids, better.mul_(label), out=ids)
        torch.maximum(best, pixels, out=best)
    return ids


class _Cells(NamedTuple):
    """Spaces between neighbouring grid points on an axis: the N that contain a pixel, none more than P."""

    low: Tensor  # (N,) start on the grid
    high: Tensor  # (N,) end on the grid
    owner: Tensor  # (pixels,) index of the space that contains each pixel
    pixels: Tensor  # (N, P) pixels in each, padded with the last one
    weights: Tensor  # (2, N, P) weights of start and end for these pixels


@functools.lru_cache(maxsize=16)
def _cells(length: int, cells: int, share: float, dtype: torch.dtype) -> _Cells:
    """Return the spaces between neighbouring grid points that contain `length` pixels."""
    low, weights = cell_weights(length, cells, share, dtype)
    begins, owner, counts = low.unique_consecutive(return_inverse=True, return_counts=True)
    offsets = torch.arange(int(counts.max())).minimum(counts[:, None] - 1)  # (N, P)
    # spaces hold different numbers of pixels: padded with their last one, they form one tensor
    pixels = (counts.cumsum(0) - counts)[:, None] + offsets
    return _Cells(begins.clamp(min=0), (begins + 1).clamp(max=cells - 1), owner, pixels, weights[:, pixels])


def _is_faster(grid: Tensor, rows: _Cells, columns: _Cells, slack: float) -> bool:
    """Return whether checking cells, estimated from a sample of them, is faster than upsampling all classes."""
    cells, pixels = len(rows.low) * len(columns.low), len(rows.owner) * len(columns.owner)
    if _CELL_COST * cells >= _PIXEL_COST * pixels:
        return False
    # an even sample of 48 x 48 cells: the choice costs little of what it saves
    down, along = ([end[:: -(-len(axis.low) // _SAMPLE)] for end in (axis.low, axis.high)] for axis in (rows, columns))
    is_candidate = _find_candidates(grid, down, along, slack)[0]
    counts = is_candidate.sum(1)
    pairs = float(counts[counts > 1].sum()) / len(is_candidate)  # mean per cell
    side = rows.pixels.shape[1] * columns.pixels.shape[1]
    return cells * (pairs * (_PAIR_COST + side) + len(grid) * _CELL_COST) < _PIXEL_COST * len(grid) * pixels


def _find_candidates(
    grid: Tensor, down: Sequence[Tensor], along: Sequence[Tensor], slack: float
) -> tuple[Tensor, Tensor]:
    """Return which classes can win in each cell (N, K), and their maximum scores there (K, N)."""
    bounds = []
    for pick in (torch.maximum, torch.minimum):
        of_rows = pick(grid.index_select(1, down[0]), grid.index_select(1, down[1]))
        of_cells = pick(of_rows.index_select(2, along[0]), of_rows.index_select(2, along[1]))
        bounds.append(of_cells.flatten(1))
    most, least = bounds
    # a pixel's score is a mean of four corners, so it lies between their least and their highest: a class whose highest
    # stays below another's least wins nowhere in the cell
    return (most >= least.amax(0) - slack).T.contiguous(), most


# grad mode is per thread
@torch.no_grad()
def _band_ids(grid: Tensor, rows: _Cells, columns: _Cells, slack: float, band: slice) -> Tensor:
    """Return the IDs (r, W) of some rows of cells of a grid (K, h, w)."""
    is_candidate, most = _find_candidates(grid, [end[band] for end in rows[:2]], columns[:2], slack)
    # right where a single class can win, which is then that of the highest maximum
    winners = most.max(0).indices.to(torch.uint8).view(-1, len(columns.low))
    owner = rows.owner[(rows.owner >= band.start) & (rows.owner < band.stop)]
    pixels = rows.pixels - rows.pixels[band.start, 0]
    ids = winners.index_select(1, columns.owner).index_select(0, owner - band.start)
    counts, side = is_candidate.sum(1), rows.pixels.shape[1] * columns.pixels.shape[1]
    # cells with equally many candidates form a dense tensor
    for count in counts.unique().tolist():
        if count == 1:
            continue
        for places in (counts == count).nonzero()[:, 0].split(max(1, _AT_ONCE // (count * side))):
            labels = is_candidate[places].nonzero()[:, 1].view(-1, count)  # ascending
            row, column = places // len(columns.low) + band.start, places % len(columns.low)
            # indices into the flattened grid: the four corners of each cell, for each of its candidates
            ends = [low[row] * grid.shape[2] + along[column] for low in rows[:2] for along in columns[:2]]
            read = (labels * grid[0].numel())[:, :, None] + torch.stack(ends, dim=1)[:, None]
            corners = grid.flatten().index_select(0, read.flatten()).view(read.shape)  # (n, count, 4)
            best = _find_best(corners, rows.weights[:, row], columns.weights[:, column])
            found = labels.to(torch.uint8).gather(1, best.flatten(1)).view_as(best)
            ids[pixels[row][:, :, None], columns.pixels[column][:, None]] = found
    return ids


def _find_best(corners: Tensor, down: Tensor, along: Tensor) -> Tensor:
    """Return the index of the highest of k classes (n, p, q), interpolated between corners (n, k, 4)."""
    sides = corners.view(*corners.shape[:2], 2, 2, 1)  # of both rows, of both columns
    # separable: to the pixels' rows on both sides of the cell first, then across
    edges = sides[:, :, 0] * down[0][:, None, None] + sides[:, :, 1] * down[1][:, None, None]  # (n, k, 2, p)
    pixels = edges[:, :, 0, :, None] * along[0][:, None, None]
    pixels.addcmul_(edges[:, :, 1, :, None], along[1][:, None, None])  # (n, k, p, q)
    return pixels.max(1).indices


@torch.no_grad()
def mixed_class_ids(masks: Tensor, shares: Tensor, size: tuple[int, int], valid: tuple[float, float]) -> Tensor:
    """Return the IDs (B, H, W) uint8 of the classes that a mixture of masks scores highest.

    A class's score is the sum over masks of share times sigmoid of the upsampled logits. Ties go to the first class;
    scores that differ only by rounding may go to either.

    Upsampled logits lie between those of the cells around them, which bounds a mask's contribution to a tile. Masks
    whose contributions together stay below a limit are evaluated only at some pixels: where they could change which
    class is best. This holds on a CPU; on an accelerator, it would require a device sync.

    Args:
        masks: logits (B, Q, h, w) of at least float32.
        shares: (B, Q, K), at least 0, of each mask in each class.
        size: (H, W) of the IDs.
        valid: share of the grid's height and width that lies on the image.
    """
    (height, width), numbers = size, masks.shape[1] + shares.shape[2]
    on_cpu = masks.device.type == "cpu"
    high = _ROWS if on_cpu else max(1, _MIXED_LAUNCHED // (numbers * width))
    wide = max(1, _CACHED // (_ROWS * numbers)) if on_cpu else width
    rows = spans(height, masks.shape[2], valid[0], high, masks)
    columns = spans(width, masks.shape[3], valid[1], wide, masks)
    with torch.autocast(masks.device.type, enabled=False), threads(masks.device) as each:
        images = [
            torch.cat(list(each(functools.partial(_mixed_band_ids, *image, columns), rows)))
            for image in zip(masks, shares, strict=True)
        ]
    return torch.stack(images)


# grad mode is per thread
@torch.no_grad()
def _mixed_band_ids(masks: Tensor, shares: Tensor, columns: list[Span], rows: Span) -> Tensor:
    """Return the IDs (r, W) of a band of rows of one image."""
    return torch.cat([_tile_ids(masks[:, rows.cells, tile.cells], shares, rows, tile) for tile in columns], dim=1)


def _tile_ids(cells: Tensor, shares: Tensor, rows: Span, columns: Span) -> Tensor:
    """Return the IDs (r, c) of a tile from the masks' cells (Q, h, w)."""
    if cells.device.type != "cpu":
        scores = _scores(upsample_tile(cells, rows, columns), shares)
        return scores.max(0).indices.to(torch.uint8)
    # an upsampled logit is at most the highest of the cells around, and sigmoid is monotonic
    most = cells.flatten(1).amax(1).sigmoid()[:, None] * shares  # (Q, K) maximum contribution of each mask
    least_first = most.amax(1).argsort()
    # masks that can add least first, as long as all of them add less than 1/32 to every class; limits from 1/64 to 1/4
    # took the same time (docs/log/speed.md)
    few = int((most[least_first].cumsum(0).amax(1) < _LEFT_OUT).sum())
    out, remaining = least_first[:few], least_first[few:]
    scores = _scores(upsample_tile(cells[remaining], rows, columns), shares[remaining])  # (K, r, c)
    best = scores.max(0)
    if few:
        # a pixel is in doubt where another class could reach the best with all that was left out
        rivals = scores + most[out].sum(0)[:, None, None]
        rivals.scatter_(0, best.indices[None], -torch.inf)
        y, x = (rivals.amax(0) >= best.values).nonzero(as_tuple=True)
        # single pixels are dearer than those of a whole tile, so many of them are evaluated as a tile
        if len(y) * _SINGLE > best.values.numel():
            scores += _scores(upsample_tile(cells[out], rows, columns), shares[out])
            best = scores.max(0)
        elif len(y):
            along = cells[out][..., x] if columns.weights is None else cells[out] @ columns.weights[x].T  # (q, h, n)
            down = torch.eye(cells.shape[1], dtype=cells.dtype) if rows.weights is None else rows.weights
            pixels = torch.einsum("qhn,nh->qn", along, down[y])
            best.indices[y, x] = (scores[:, y, x] + _scores(pixels, shares[out])).max(0).indices
    return best.indices.to(torch.uint8)


def _scores(pixels: Tensor, shares: Tensor) -> Tensor:
    """Return scores (K, ...) from upsampled logits (Q, ...), which are overwritten, and shares (Q, K)."""
    return (shares.T @ pixels.sigmoid_().flatten(1)).unflatten(1, pixels.shape[1:])
