"""Interpolation of learned position embeddings, exactly as in Meta's code."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dinoseg.core.geometry import resize
from dinoseg.utils.precision import at_least_float32

METHODS = {  # (offset, antialias) of Meta's published models, by transformers model type
    "vit": (0.1, False),
    "dinov2": (0.1, False),
    "dinov2_with_registers": (0.0, True),
}


def interpolate(positions: Tensor, grid: tuple[int, int], *, offset: float, antialias: bool) -> Tensor:
    """Resample learned positions of a square grid bicubically to another grid.

    With an offset, the scale is (cells + offset) / stored cells, so cells are not quite evenly spread. This early
    guard against rounding was active when the weights were trained; leaving it out visibly changes DINO's and
    DINOv2's features. Half-precision positions are resampled in float32.

    Args:
        positions: (1, 1 + M * M, C): the class token, then the stored grid, row by row.
        grid: (h, w), rows and columns of patches. Only at (M, M) are the positions returned unchanged, even with an
            offset.
        offset: in cells of the target grid; 0 resamples to the exact size.
        antialias: widen the kernel when the grid shrinks.

    Returns:
        (1, 1 + h * w, C), with the class token's position unchanged.
    """
    side = math.isqrt(positions.shape[1] - 1)
    if not torch.compiler.is_exporting() and grid == (side, side):
        return positions
    precise = at_least_float32(positions)
    stored = precise[:, 1:].transpose(1, 2).unflatten(2, (side, side))  # (1, C, M, M)
    if torch.compiler.is_exporting():
        resized = _interpolate_traced(stored, grid, offset, antialias)
    elif offset:
        scale = ((grid[0] + offset) / side, (grid[1] + offset) / side)
        resized = F.interpolate(stored, scale_factor=scale, mode="bicubic", antialias=antialias)
    elif antialias:
        resized = resize(stored, grid, "bicubic")
    else:
        resized = F.interpolate(stored, grid, mode="bicubic")
    return torch.cat([precise[:, :1], resized.flatten(2).transpose(1, 2)], dim=1).to(positions.dtype)


def _interpolate_traced(stored: Tensor, grid: tuple[int, int], offset: float, antialias: bool) -> Tensor:
    """Return the interpolation as two matrix products, (1, C, h, w), so that exported graphs accept any grid.

    Other runtimes round scales differently and use a different antialiased bicubic kernel.
    """
    side = stored.shape[-1]
    height, width = (torch.full((), cells, dtype=torch.float32) for cells in grid)
    is_stored = (height == side) & (width == side)
    more = torch.where(is_stored, 0.0, offset)
    rows = _bicubic_matrix(torch.arange(grid[0]), side, (height + more) / side, antialias)  # (h, M)
    columns = _bicubic_matrix(torch.arange(grid[1]), side, (width + more) / side, antialias)  # (w, M)
    return rows @ stored @ columns.T


def _bicubic_matrix(cells: Tensor, side: int, scale: Tensor, antialias: bool) -> Tensor:
    """Return the weights (cells, side) of `side` stored cells for `cells`; borders replicate the last cell."""
    reach = (1 / scale).clamp(min=1) if antialias else torch.ones(())  # the kernel widens where the grid shrinks
    sharpness = -0.5 if antialias else -0.75  # torch's constants
    centres = (cells + 0.5) / scale - 0.5
    if antialias:
        taps = _bicubic((torch.arange(side) - centres[:, None]) / reach, sharpness)
        return taps / taps.sum(dim=1, keepdim=True)
    steps = torch.arange(-1, 3)
    taps = centres.floor()[:, None] + steps  # (cells, 4)
    weights = _bicubic(taps - centres[:, None], sharpness)
    stored = taps.clamp(0, side - 1)[..., None] == torch.arange(side)  # (cells, 4, side)
    return (weights[..., None] * stored).sum(dim=1)


def _bicubic(distance: Tensor, a: float) -> Tensor:
    """Return Keys' cubic convolution kernel."""
    x = distance.abs()
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return torch.where(x <= 1, near, torch.where(x < 2, far, torch.zeros(())))
