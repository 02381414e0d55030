"""Conversions between patch grids and pixels without stretching: padding, cropping and upsampling."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dinoseg.utils.devices import to_device
from dinoseg.utils.levels import EXACT
from dinoseg.utils.precision import at_least_float32

LATTICE = 1024  # pixels that represent an image
_READ = 48  # cells per piece of a run on a CPU: weights of all cells of a fine grid would be mostly zeros
_MIN_PIECE = 64  # pixels


def to_unit_range(images: Tensor) -> Tensor:
    """Return levels of 8 or 16 bits as float32 in 0..1; floats stay."""
    if images.is_floating_point():
        return images
    return images.float() / torch.iinfo(images.dtype).max


def unify_depth(images: Sequence[Tensor]) -> list[Tensor]:
    """Convert 8-bit images to 16 bits (white stays white) if the others have 16; equal depths are unchanged."""
    if {image.dtype for image in images} != {torch.uint8, torch.uint16}:
        return list(images)
    return [image if image.dtype == torch.uint16 else (image.int() * EXACT).to(torch.uint16) for image in images]


def pad_to_multiple(images: Tensor, multiple: int) -> Tensor:
    """Pad (B, C, H, W) with zeros at the bottom and on the right to a multiple of `multiple` pixels."""
    height, width = images.shape[-2:]
    return F.pad(images, (0, -width % multiple, 0, -height % multiple))


def valid_share(size: tuple[int, int], multiple: int) -> tuple[float, float]:
    """Return the share of the padded height and width that an image of `size` (H, W) covers, in (0, 1]."""
    height, width = size
    return height / (height + -height % multiple), width / (width + -width % multiple)


def resize(images: Tensor, size: tuple[int, int], mode: str = "bilinear") -> Tensor:
    """Resize (B, C, H, W) to `size` (H, W) as `F.interpolate` with `antialias=True`, also to a single column.

    On a CPU, torch 2.15 misreads the intermediate result when it has resized to one column and continues with the rows.
    """
    # turned, the single column is a single row, which is resized last
    if size[1] == 1:
        return F.interpolate(images.transpose(2, 3), (1, size[0]), mode=mode, antialias=True).transpose(2, 3)
    return F.interpolate(images, size, mode=mode, antialias=True)


def concatenate(features: Sequence[Tensor]) -> Tensor:
    """Concatenate maps (B, C, h, w) along the channels, each resized (bilinear) to the finest grid."""
    grid = max((tuple(part.shape[-2:]) for part in features), key=math.prod)
    on_grid = [
        part if part.shape[-2:] == grid else F.interpolate(part, grid, mode="bilinear", align_corners=False)
        for part in features
    ]
    return torch.cat(on_grid, dim=1)


def widths(dim: int | Sequence[int], num_layers: int) -> list[int]:
    """Return the width of each of `num_layers` maps; `dim` is one width for all of them, or a list."""
    return [dim] * num_layers if isinstance(dim, int) else list(dim)


def lattice(size: tuple[int, int], points: int = LATTICE) -> tuple[slice, slice]:
    """Return rows and columns of an (H, W) image that represent all pixels: evenly spaced, about `points` in total.

    They depend only on the size, so they are the same for an image that is predicted in parts.
    """
    step = math.ceil(math.sqrt(math.prod(size) / points))
    rows, columns = (slice(min(step, length) // 2, None, step) for length in size)
    return rows, columns


def upsample(logits: Tensor, size: tuple[int, int], valid: tuple[float, float]) -> Tensor:
    """Resize the image part of (B, K, h, w) bilinearly to `size` (H, W), pixel centres aligned.

    Only the top left `valid` share of the grid lies on the image. Output pixel y reads grid position
    (y + 0.5) * h * valid / H - 0.5. Nothing is stretched, and padding is cropped to a fraction of a cell.
    Half-precision scores are cast to float32 first.
    """
    # half precision would tie neighbouring classes, and lose gradients in long sums
    logits = at_least_float32(logits)
    height, width = size
    grid_h, grid_w = logits.shape[-2:]
    if _stays(height, grid_h, valid[0]) and _stays(width, grid_w, valid[1]):
        return logits[..., :height, :width]
    # resize the whole grid at the image's scale, then crop; F.interpolate takes the floor of grid * scale,
    # and the nudge prevents an exact integer from being rounded down by one
    nudge = 1 + 1e-12
    scale = (nudge * height / (grid_h * valid[0]), nudge * width / (grid_w * valid[1]))
    if int(grid_h * scale[0]) == grid_h or int(grid_w * scale[1]) == grid_w:
        # F.interpolate copies an axis of unchanged length, whatever its scale: two small matrix products instead
        return upsample_at(logits, size, valid, (slice(None), slice(None)))
    resized = F.interpolate(logits, scale_factor=scale, mode="bilinear", recompute_scale_factor=False)
    return resized[..., :height, :width]


def upsample_at(
    logits: Tensor, size: tuple[int, int], valid: tuple[float, float], places: tuple[slice, slice]
) -> Tensor:
    """Return some rows and columns of the result of `upsample`, up to rounding."""
    logits = at_least_float32(logits)
    rows, columns = (
        to_device(_weights(_positions(length, cells, share)[chosen], cells).to(logits.dtype), logits.device)
        for length, cells, share, chosen in zip(size, logits.shape[-2:], valid, places, strict=True)
    )
    # autocast would multiply in half precision
    with torch.autocast(logits.device.type, enabled=False):
        return rows @ logits @ columns.T


def cell_weights(length: int, cells: int, share: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the cells of a grid between which each of `length` pixels lies, and their weights in `upsample`.

    Returns:
        The preceding cell (length,), ascending, -1 before the first one. The weights of that cell and the next one
        (2, length); past the ends, 1 and 0 for the outermost cell.
    """
    # the weights are read from `upsample` itself, so that they are rounded as there: it enlarges three maps, each of
    # every third cell; two neighbours are in different maps, whose values at a pixel are thus the weights of both
    thirds = F.one_hot(torch.arange(cells) % 3, 3).T.to(dtype)
    read = upsample(thirds[None, :, :, None], (length, 2), (share, 1.0))[0, :, :, 0]  # (3, length)
    positions = (torch.arange(length, dtype=torch.float64) + 0.5) * cells * share / length - 0.5
    low = positions.floor().long()
    astray = read.gather(0, (low + 2)[None] % 3)[0] > 0  # rounded past a cell: reads one other than low, low + 1
    low += torch.where(astray & (low >= 0) & (low + 1 < cells), torch.where(positions - low < 0.5, -1, 1), 0)
    weights = torch.stack([read.gather(0, (low + side)[None] % 3)[0] for side in (0, 1)])
    weights[:, (low < 0) | (low + 1 >= cells)] = weights.new_tensor([[1.0], [0.0]])
    return low, weights


class Piece(NamedTuple):
    """Part of a run of pixels that reads few cells; indices of both are relative to the run."""

    pixels: slice
    cells: slice
    weights: Tensor  # (pixels, cells)


class Span(NamedTuple):
    """Run of pixels along an axis, and the grid cells that it reads in upsampling."""

    pixels: slice
    cells: slice
    weights: Tensor | None  # (pixels, cells); None: each pixel coincides with its cell
    pieces: Sequence[Piece] = ()  # of a run with many cells, if smaller products are faster


def spans(length: int, cells: int, share: float, at_once: int, like: Tensor) -> list[Span]:
    """Split an axis of `length` pixels into runs of at most `at_once`, with the `cells` that `upsample` reads for each.

    Args:
        length: pixels, H or W.
        cells: number of grid cells along this axis, h or w.
        share: share of the cells that the pixels cover, counted from the first one.
        at_once: maximum number of pixels in a run.
        like: tensor with the type and device of the weights.
    """
    if _stays(length, cells, share):
        return [Span(run, run, None) for run in _runs(length, at_once)]
    positions = _positions(length, cells, share)
    # without pieces, a training step on a CPU takes 1.1 to 1.5 times as long on fine grids (docs/decisions.md)
    piece = max(_MIN_PIECE, math.ceil(_READ * length / (cells * share)))  # pixels
    found = []
    for run in _runs(length, at_once):
        cells_read, weights = _reads(positions[run], cells, like)
        pieces = []
        if piece < len(weights) and like.device.type == "cpu":
            offsets, width = positions[run] - cells_read.start, weights.shape[1]
            pieces = [Piece(part, *_reads(offsets[part], width, like)) for part in _runs(len(weights), piece)]
        found.append(Span(run, cells_read, weights, pieces))
    return found


def _runs(length: int, at_once: int) -> list[slice]:
    return [slice(start, min(start + at_once, length)) for start in range(0, length, at_once)]


def _reads(positions: Tensor, cells: int, like: Tensor) -> tuple[slice, Tensor]:
    """Return the cells of a grid that pixels at ascending positions read, and their weights (pixels, cells)."""
    # ascending positions: from the cell at or before the first pixel to the one after the last
    first, last = int(positions[0]), min(int(positions[-1]) + 2, cells)
    weights = _weights(positions - first, last - first).to(like.dtype)
    return slice(first, last), to_device(weights, like.device)


def upsample_tile(cells: Tensor, rows: Span, columns: Span) -> Tensor:
    """Return a tile (K, H, W) in new memory, upsampled from its cells (K, h, w); it has no gradient."""
    # bilinear upsampling is separable: the tile is R X C^T with the weights R of rows and C of columns. Columns come
    # first, while there are only a few rows of cells: rows first would multiply every row of pixels by C
    if columns.weights is None:
        tile = cells.clone(memory_format=torch.contiguous_format)
    else:
        tile = _along(cells.flatten(0, 1), columns.weights, columns.pieces).unflatten(0, cells.shape[:2])
    return tile if rows.weights is None else rows.weights @ tile


def reduce_tile(tile: Tensor, rows: Span, columns: Span) -> Tensor:
    """Return the gradient of the cells (K, h, w) from that of the tile (K, H, W) that `upsample_tile` returned."""
    # the gradient of R X C^T by X is R^T G C: the rows first, in the reverse order
    cells = tile if rows.weights is None else rows.weights.T @ tile
    if columns.weights is None:
        return cells
    return _back_along(cells.flatten(0, 1), columns.weights, columns.pieces).unflatten(0, cells.shape[:2])


def _along(read: Tensor, weights: Tensor, pieces: Sequence[Piece]) -> Tensor:
    """Return rows of pixels (N, W), upsampled from rows of cells (N, w)."""
    if not pieces:
        return read @ weights.T
    pixels = read.new_empty(len(read), len(weights))
    for piece in pieces:
        torch.mm(read[:, piece.cells], piece.weights.T, out=pixels[:, piece.pixels])
    return pixels


def _back_along(pixels: Tensor, weights: Tensor, pieces: Sequence[Piece]) -> Tensor:
    """Return the gradient of rows of cells (N, w) from that of the pixels (N, W) that `_along` returned."""
    if not pieces:
        return pixels @ weights
    read = pixels.new_zeros(len(pixels), weights.shape[1])
    for piece in pieces:
        read[:, piece.cells].addmm_(pixels[:, piece.pixels], piece.weights)
    return read


def _stays(length: int, cells: int, share: float) -> bool:
    """Return whether each of `length` pixels coincides with a cell of the grid."""
    return abs(cells * share - length) < 1e-6


def _positions(length: int, cells: int, share: float) -> Tensor:
    """Return the grid position of each of `length` pixels, in cells from the centre of the first, float64."""
    positions = (torch.arange(length, dtype=torch.float64) + 0.5) * cells * share / length - 0.5
    return positions.clamp(0, cells - 1)


def _weights(positions: Tensor, cells: int) -> Tensor:
    """Return the weight of each cell for a pixel at each position (pixels, cells), float64."""
    # the two cells around a position get 1 minus their distance, all others 0
    distance = (positions[:, None] - torch.arange(cells, dtype=torch.float64)).abs()
    return (1 - distance).clamp(min=0)
