"""Conversion between maps of several levels and one token sequence, and positions of their cells."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Size = tuple[int, int]  # rows and columns of a level


def size_of(level: Tensor) -> Size:
    """Return the rows and columns of a map (B, C, h, w)."""
    return level.shape[-2], level.shape[-1]


def to_tokens(maps: Sequence[Tensor]) -> Tensor:
    """Concatenate maps (B, C, h, w) to tokens (B, N, C): level by level, row by row."""
    return torch.cat([level.flatten(2).transpose(1, 2) for level in maps], dim=1)


def to_maps(tokens: Tensor, sizes: Sequence[Size]) -> list[Tensor]:
    """Invert `to_tokens`."""
    parts = tokens.split([math.prod(size) for size in sizes], dim=1)
    return [part.transpose(1, 2).contiguous().unflatten(2, size) for part, size in zip(parts, sizes, strict=True)]


def cell_centres(sizes: Sequence[Size], like: Tensor) -> Tensor:
    """Return x and y (N, 2) of all cells in the order of `to_tokens`, in 0..1 from edge to edge of their level."""
    centres = []
    for rows, columns in sizes:
        # centre i of n is at (i + 0.5) / n, as `grid_sample` counts with align_corners=False
        y = (torch.arange(rows, device=like.device, dtype=like.dtype) + 0.5) / rows
        x = (torch.arange(columns, device=like.device, dtype=like.dtype) + 0.5) / columns
        grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
        centres.append(torch.stack((grid_x, grid_y), dim=-1).flatten(0, 1))
    return torch.cat(centres)


def sine_positions(size: Size, dim: int, like: Tensor) -> Tensor:
    """Return sine and cosine position codes (N, dim) of the cells: half the channels for y, half for x.

    Cell i of n has the angle 2 pi (i + 1) / n, divided by dim / 4 powers of 10000, as in Carion et al. (arXiv
    2005.12872).
    """
    rows, columns = size
    pairs = torch.arange(dim // 4, device=like.device, dtype=like.dtype)
    divisors = 10000 ** (2 * pairs / (dim // 2))

    def waves(count: int) -> Tensor:
        steps = torch.arange(1, count + 1, device=like.device, dtype=like.dtype)
        # the 1e-6 is DETR's: the released weights were trained with it
        angles = (steps / (count + 1e-6) * (2 * math.pi))[:, None] / divisors  # (count, dim / 4)
        return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)  # (count, dim / 2)

    y, x = waves(rows), waves(columns)
    return torch.cat((y[:, None].expand(-1, columns, -1), x[None].expand(rows, -1, -1)), dim=-1).flatten(0, 1)
