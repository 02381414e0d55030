"""Padding to the patch multiple and back, without stretching: the one place where grids meet pixels."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dinoseg.utils.precision import at_least_float32
from dinoseg.utils.transfer import sent

LATTICE = 1024  # pixels of an image that stand for it
_READ = 48  # cells that a piece of a run reads on a CPU: a product with all cells of a fine grid is with zeros mostly
_LEAST_PIECE = 64  # pixels


def pad_to_multiple(images: Tensor, multiple: int) -> Tensor:
    """Pad (B, C, H, W) with zeros at the bottom and on the right to a multiple of `multiple` pixels."""
    height, width = images.shape[-2:]
    return F.pad(images, (0, -width % multiple, 0, -height % multiple))


def valid_share(size: tuple[int, int], multiple: int) -> tuple[float, float]:
    """Return the share of the padded height and width that an image of `size` (H, W) covers, in (0, 1]."""
    height, width = size
    return height / (height + -height % multiple), width / (width + -width % multiple)


def resize(images: Tensor, size: tuple[int, int], mode: str = "bilinear") -> Tensor:
    """Resize (B, C, H, W) to `size` (H, W) as `F.interpolate` with `antialias=True`, one column of pixels rightly too.

    On a CPU, torch 2.15 misreads what it has resized to one column when it goes on to the rows.
    """
    if size[1] == 1:
        return F.interpolate(images.transpose(2, 3), (1, size[0]), mode=mode, antialias=True).transpose(2, 3)
    return F.interpolate(images, size, mode=mode, antialias=True)


def concatenate(features: Sequence[Tensor]) -> Tensor:
    """Concatenate maps (B, C, h, w) on their channels, each on the grid of the finest (bilinear)."""
    grid = max((tuple(part.shape[-2:]) for part in features), key=math.prod)
    on_grid = [
        part if part.shape[-2:] == grid else F.interpolate(part, grid, mode="bilinear", align_corners=False)
        for part in features
    ]
    return torch.cat(on_grid, dim=1)


def widths(dim: int | Sequence[int], num_layers: int) -> list[int]:
    """Return the width of each of `num_layers` maps; `dim` is one for all of them, or a list."""
    return [dim] * num_layers if isinstance(dim, int) else list(dim)


def lattice(size: tuple[int, int], points: int = LATTICE) -> tuple[slice, slice]:
    """Return rows and columns of an (H, W) image that stand for all its pixels: evenly spaced, about so many points.

    Only the size decides where they lie, so an image that is predicted piece by piece has the same ones.
    """
    step = math.ceil(math.sqrt(math.prod(size) / points))
    rows, columns = (slice(min(step, length) // 2, None, step) for length in size)
    return rows, columns


def upsample(logits: Tensor, size: tuple[int, int], valid: tuple[float, float]) -> Tensor:
    """Resize the image part of (B, K, h, w) bilinearly to `size` (H, W), pixel centres aligned.

    Only the top left `valid` share of the grid lies on the image. Output pixel y reads grid position
    (y + 0.5) * h * valid / H - 0.5, so nothing is stretched and padding is cropped to a fraction of a cell.
    Half-precision scores are taken to float32 first.
    """
    logits = at_least_float32(logits)  # half would tie neighbouring classes, and lose gradients in long sums
    height, width = size
    grid_h, grid_w = logits.shape[-2:]
    if _stays(height, grid_h, valid[0]) and _stays(width, grid_w, valid[1]):
        return logits[..., :height, :width]
    # The whole grid at the image's own scale, then the crop. F.interpolate takes the floor of grid * scale:
    # the nudge keeps an exact integer from falling one short.
    nudge = 1 + 1e-12
    scale = (nudge * height / (grid_h * valid[0]), nudge * width / (grid_w * valid[1]))
    if int(grid_h * scale[0]) == grid_h or int(grid_w * scale[1]) == grid_w:
        # F.interpolate copies an axis whose length stays, whatever its scale: two small matrix products instead
        return upsample_at(logits, size, valid, (slice(None), slice(None)))
    resized = F.interpolate(logits, scale_factor=scale, mode="bilinear", recompute_scale_factor=False)
    return resized[..., :height, :width]


def upsample_at(
    logits: Tensor, size: tuple[int, int], valid: tuple[float, float], places: tuple[slice, slice]
) -> Tensor:
    """Return some rows and columns of what `upsample` returns, but for rounding."""
    logits = at_least_float32(logits)
    rows, columns = (
        sent(_weights(_positions(length, cells, share)[chosen], cells).to(logits.dtype), logits.device)
        for length, cells, share, chosen in zip(size, logits.shape[-2:], valid, places, strict=True)
    )
    with torch.autocast(logits.device.type, enabled=False):  # which would multiply in half precision
        return rows @ logits @ columns.T


def cell_weights(length: int, cells: int, share: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return between which cells of a grid each of `length` pixels lies, and what `upsample` makes it read of these.

    Returns:
        The one before it (length,), -1 above the first one, ascending; what it reads of that one and of the next
        (2, length), where past the ends those are the outermost cell.
    """
    thirds = F.one_hot(torch.arange(cells) % 3, 3).T.to(dtype)  # any two neighbours differ
    read = upsample(thirds[None, :, :, None], (length, 2), (share, 1.0))[0, :, :, 0]  # (3, length)
    positions = (torch.arange(length, dtype=torch.float64) + 0.5) * cells * share / length - 0.5
    low = positions.floor().long()
    astray = read.gather(0, (low + 2)[None] % 3)[0] > 0  # rounded past a cell: it reads neither low nor the one after
    low += torch.where(astray & (low >= 0) & (low + 1 < cells), torch.where(positions - low < 0.5, -1, 1), 0)
    weights = torch.stack([read.gather(0, (low + side)[None] % 3)[0] for side in (0, 1)])
    weights[:, (low < 0) | (low + 1 >= cells)] = weights.new_tensor([[1.0], [0.0]])
    return low, weights


class Piece(NamedTuple):
    """A part of a run of pixels that reads few cells; both counted from the first of the run."""

    pixels: slice
    cells: slice
    weights: Tensor  # (pixels, cells)


class Span(NamedTuple):
    """A run of pixels along an axis, and the grid cells that they read when these are upsampled."""

    pixels: slice
    cells: slice
    weights: Tensor | None  # (pixels, cells): what each pixel reads; None: each pixel is its cell
    pieces: Sequence[Piece] = ()  # of the run, where it reads many cells and a product with fewer pays


def spans(length: int, cells: int, share: float, at_once: int, like: Tensor) -> list[Span]:
    """Return an axis of `length` pixels in runs of at most `at_once`, which read `cells` as `upsample` does.

    Args:
        length: pixels, H or W.
        cells: of the grid along this axis, h or w.
        share: of the cells that the pixels cover, counted from the first one.
        at_once: pixels.
        like: of the type and on the device that the weights are wanted of and on.
    """
    if _stays(length, cells, share):
        return [Span(run, run, None) for run in _runs(length, at_once)]
    positions = _positions(length, cells, share)
    piece = max(_LEAST_PIECE, math.ceil(_READ * length / (cells * share)))  # pixels
    found = []
    for run in _runs(length, at_once):
        cells_read, weights = _reads(positions[run], cells, like)
        pieces = []
        if piece < len(weights) and like.device.type == "cpu":
            own, width = positions[run] - cells_read.start, weights.shape[1]
            pieces = [Piece(part, *_reads(own[part], width, like)) for part in _runs(len(weights), piece)]
        found.append(Span(run, cells_read, weights, pieces))
    return found


def _runs(length: int, at_once: int) -> list[slice]:
    return [slice(start, min(start + at_once, length)) for start in range(0, length, at_once)]


def _reads(positions: Tensor, cells: int, like: Tensor) -> tuple[slice, Tensor]:
    """Return which cells of a grid pixels at ascending positions read, and how much (pixels, cells)."""
    first, last = int(positions[0]), min(int(positions[-1]) + 2, cells)
    weights = _weights(positions - first, last - first).to(like.dtype)
    return slice(first, last), sent(weights, like.device)


def upsample_tile(cells: Tensor, rows: Span, columns: Span) -> Tensor:
    """Return a tile (K, H, W) of its own memory from the cells (K, h, w) that it reads; it has no gradient."""
    if columns.weights is None:
        tile = cells.clone(memory_format=torch.contiguous_format)
    else:
        tile = _along(cells.flatten(0, 1), columns.weights, columns.pieces).unflatten(0, cells.shape[:2])
    return tile if rows.weights is None else rows.weights @ tile


def reduce_tile(tile: Tensor, rows: Span, columns: Span) -> Tensor:
    """Return the gradient of the cells (K, h, w) from that of the tile (K, H, W) that `upsample_tile` makes of them."""
    cells = tile if rows.weights is None else rows.weights.T @ tile
    if columns.weights is None:
        return cells
    return _back_along(cells.flatten(0, 1), columns.weights, columns.pieces).unflatten(0, cells.shape[:2])


def _along(read: Tensor, weights: Tensor, pieces: Sequence[Piece]) -> Tensor:
    """Return the pixels (N, W) of rows of cells (N, w)."""
    if not pieces:
        return read @ weights.T
    pixels = read.new_empty(len(read), len(weights))
    for piece in pieces:
        torch.mm(read[:, piece.cells], piece.weights.T, out=pixels[:, piece.pixels])
    return pixels


def _back_along(pixels: Tensor, weights: Tensor, pieces: Sequence[Piece]) -> Tensor:
    """Return the gradient of rows of cells (N, w) from that of the pixels (N, W) that `_along` makes of them."""
    if not pieces:
        return pixels @ weights
    read = pixels.new_zeros(len(pixels), weights.shape[1])
    for piece in pieces:
        read[:, piece.cells].addmm_(pixels[:, piece.pixels], piece.weights)
    return read


def _stays(length: int, cells: int, share: float) -> bool:
    """Return whether each of `length` pixels is a cell of the grid."""
    return abs(cells * share - length) < 1e-6


def _positions(length: int, cells: int, share: float) -> Tensor:
    """Return where on the grid each of `length` pixels lies, in cells from the centre of the first, float64."""
    positions = (torch.arange(length, dtype=torch.float64) + 0.5) * cells * share / length - 0.5
    return positions.clamp(0, cells - 1)


def _weights(positions: Tensor, cells: int) -> Tensor:
    """Return what a pixel at each position reads of each cell (pixels, cells), float64."""
    distance = (positions[:, None] - torch.arange(cells, dtype=torch.float64)).abs()
    return (1 - distance).clamp(min=0)
