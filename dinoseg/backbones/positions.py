"""Learned positions on other grids than the stored one, resampled exactly as Meta does it."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dinoseg.precision import at_least_float32

METHODS = {  # offset, antialias: of Meta's published models, by transformers' model type
    "vit": (0.1, False),
    "dinov2": (0.1, False),
    "dinov2_with_registers": (0.0, True),
}


def interpolate(positions: Tensor, grid: tuple[int, int], *, offset: float, antialias: bool) -> Tensor:
    """Resample learned positions of a square grid bicubically to another grid.

    With an offset, the scale is (cells + offset) / stored cells, so that cells are not quite evenly spread: an early
    guard against rounding which the weights were trained with, and which moves DINO's and DINOv2's features visibly
    when left out. Positions of half precision are resampled in float32.

    Args:
        positions: (1, 1 + M * M, C): of the class token, then of the stored grid, row by row.
        grid: (h, w), rows and columns of patches wanted. At (M, M), and only there, the positions come back untouched,
            even with an offset.
        offset: in cells of the wanted grid; 0 asks for the size itself.
        antialias: widen the kernel when the grid shrinks.

    Returns:
        (1, 1 + h * w, C), the class token's position as it was.
    """
    side = math.isqrt(positions.shape[1] - 1)
    if grid == (side, side):
        return positions
    precise = at_least_float32(positions)
    stored = precise[:, 1:].transpose(1, 2).unflatten(2, (side, side))  # (1, C, M, M)
    if offset:
        scale = ((grid[0] + offset) / side, (grid[1] + offset) / side)
        resized = F.interpolate(stored, scale_factor=scale, mode="bicubic", antialias=antialias)
    else:
        resized = F.interpolate(stored, grid, mode="bicubic", antialias=antialias)
    return torch.cat([precise[:, :1], resized.flatten(2).transpose(1, 2)], dim=1).to(positions.dtype)
