"""Deformable attention in plain torch: each query reads a few sampled points instead of all cells."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinoseg.extensions.query_heads.mask2former.levels import Size
from dinoseg.utils.devices import to_device
from dinoseg.utils.precision import at_least_float32

POINTS = 4  # per head and level
# sampled values per chunk, 256 MiB in float32; only without gradients, since the backward pass needs all chunks, of
# every layer at once or, with `checkpointing`, of one layer at a time
AT_ONCE = 2**26


class DeformableAttention(nn.Module):
    """Multi-scale deformable attention (Zhu et al., arXiv 2010.04159), forward and backward on any device.

    The sampling always runs in float32: half precision would move the points by fractions of a cell.

    Args:
        dim: width of queries and cells.
        num_heads: M, a divisor of the width of the values.
        num_levels: number of maps L.
        ratio: width of the values divided by `dim`.
    """

    def __init__(self, dim: int, num_heads: int, num_levels: int, ratio: float = 1.0) -> None:
        super().__init__()
        values = int(dim * ratio)
        self.shape = (num_heads, num_levels, POINTS)
        self.sampling_offsets = nn.Linear(dim, math.prod(self.shape) * 2)
        self.attention_weights = nn.Linear(dim, math.prod(self.shape))
        self.value_proj = nn.Linear(dim, values)
        self.output_proj = nn.Linear(values, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise equal weights and points along one direction per head, 1 to 4 cells away."""
        for layer in (self.sampling_offsets, self.attention_weights):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        for layer in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        num_heads, num_levels, points = self.shape
        angles = torch.arange(num_heads) * (2 * math.pi / num_heads)
        directions = torch.stack((angles.cos(), angles.sin()), dim=-1)
        directions = directions / directions.abs().amax(-1, keepdim=True)  # onto the square around the query
        offsets = directions[:, None, None] * torch.arange(1, points + 1)[:, None]  # (M, 1, P, 2)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.expand(-1, num_levels, -1, -1).flatten())

    def forward(self, queries: Tensor, centres: Tensor, cells: Tensor, sizes: Sequence[Size]) -> Tensor:
        """Return the attention output (B, Q, dim).

        Args:
            queries: (B, Q, dim).
            centres: (Q, 2), x and y of each query in 0..1.
            cells: (B, N, dim), all levels in the order of `to_tokens`.
            sizes: rows and columns of the L levels.
        """
        offsets = self.sampling_offsets(queries).unflatten(-1, (*self.shape, 2))  # (B, Q, M, L, P, 2)
        weights = self.attention_weights(queries).unflatten(-1, self.shape)  # (B, Q, M, L, P)
        values = self.value_proj(cells).unflatten(-1, (self.shape[0], -1))  # (B, N, M, D)
        with torch.autocast(queries.device.type, enabled=False):
            offsets, weights, values = (at_least_float32(part) for part in (offsets, weights, values))
            # sum of weight * value(centre + offset / size) over levels and points, whose weights add up to 1 (eq. 3)
            weights = weights.flatten(3).softmax(-1).view_as(weights)
            scale = torch.tensor([(columns, rows) for rows, columns in sizes], dtype=offsets.dtype)  # (L, 2)
            points = centres[:, None, None, None].to(offsets) + offsets / to_device(scale, offsets.device)[:, None]
            read = sample(values, sizes, points, weights)
        return self.output_proj(read)


def sample(values: Tensor, sizes: Sequence[Size], points: Tensor, weights: Tensor) -> Tensor:
    """Return weighted sums (B, Q, M * D) of values sampled bilinearly at points; values outside a level are zero.

    Args:
        values: (B, N, M, D), the cells of all levels; M heads.
        sizes: rows and columns of the L levels.
        points: (B, Q, M, L, P, 2), x and y in 0..1 from edge to edge of a level.
        weights: (B, Q, M, L, P).
    """
    batch, num_heads, channels = values.shape[0], *values.shape[2:]
    parts = values.permute(0, 2, 3, 1).flatten(0, 1).split([math.prod(size) for size in sizes], dim=-1)
    maps = [part.unflatten(-1, size) for part, size in zip(parts, sizes, strict=True)]  # L of (B * M, D, h, w)
    grid = (2 * points - 1).transpose(1, 2).flatten(0, 1)  # (B * M, Q, L, P, 2), in -1..1
    weights = weights.transpose(1, 2).flatten(0, 1).flatten(2)  # (B * M, Q, L * P)
    step = max(1, AT_ONCE // (channels * weights.shape[0] * weights.shape[-1]))  # queries
    bands = zip(grid.split(step, dim=1), weights.split(step, dim=1), strict=True)
    read = torch.cat([_sample_band(maps, *band) for band in bands], dim=-1)  # (B * M, D, Q)
    return read.unflatten(0, (batch, num_heads)).flatten(1, 2).transpose(1, 2).contiguous()


def _sample_band(maps: Sequence[Tensor], grid: Tensor, weights: Tensor) -> Tensor:
    read = [F.grid_sample(level, grid[:, :, index], align_corners=False) for index, level in enumerate(maps)]
    return (torch.cat(read, dim=-1) * weights[:, None]).sum(-1)  # (B * M, D, Q)
