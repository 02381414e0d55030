"""Position codes of cells for the slot decoder and for tokens."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinoseg.utils.errors import UserError

PositionKind = Literal["learned", "sine", "linear", "added"]
_CHANNELS = {"learned": 4, "sine": 4, "linear": 2}
_CLUSTER_STD = 1.5  # initial standard deviation of a token's position code if slots start as clusters


def training_grid(positions_grid: Sequence[int] | None, positions: str, similarity: bool) -> tuple[int, int]:
    """Return rows and columns of the training cells, or (1, 1) if no module depends on them.

    Args:
        positions_grid: rows and columns, or None if unknown.
        positions: kind of positions.
        similarity: whether logits over these cells are predicted.

    Raises:
        UserError: invalid rows and columns, or None although they are needed.
    """
    if positions_grid is None and (similarity or positions != "linear"):
        user = "similarity=true" if similarity else f"positions={positions}"
        raise UserError(
            f"{user} needs the grid of a training crop, but positions_grid=null. Set the patch size of the "
            "backbone, from which it is computed; or its rows and columns, such as positions_grid=[14,14]."
        )
    rows_columns = [1, 1] if positions_grid is None else positions_grid
    if len(rows_columns) != 2 or min(rows_columns) < 1:
        raise UserError(f"positions_grid={list(rows_columns)}: give rows and columns of cells, such as [28,28].")
    return rows_columns[0], rows_columns[1]


def linear_positions(grid: tuple[int, int], like: Tensor) -> Tensor:
    """Return row and column coordinates (2, h, w), from -1 at the first to 1 at the last."""
    axes = (torch.linspace(-1, 1, cells, device=like.device, dtype=like.dtype) for cells in grid)
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))


def position_layer(dim: int, *, clusters: bool) -> nn.Linear:
    """Return a linear layer from a position (..., 2) to a code (..., dim) that is added to a token.

    With `clusters`, its initial magnitude matches channels of variance 1, so that distant tokens are distinguishable.
    """
    layer = nn.Linear(2, dim)
    if clusters:
        nn.init.normal_(layer.weight, std=_CLUSTER_STD)
        nn.init.zeros_(layer.bias)
    return layer


def sine_positions(grid: tuple[int, int], like: Tensor) -> Tensor:
    """Return (4, h, w): sine and cosine of the column index, then of the row index, in radians."""
    # a cell is one radian: codes nearly repeat after 2 pi, about six, cells
    axes = (torch.arange(cells, device=like.device, dtype=like.dtype) for cells in grid)
    rows, columns = torch.meshgrid(*axes, indexing="ij")
    return torch.stack([columns.sin(), columns.cos(), rows.sin(), rows.cos()])


class Positions(nn.Module):
    """Position codes of one kind for any grid.

    Args:
        kind: `learned`, `sine` or `added`, defined on one grid and resampled bicubically to any other; or `linear`,
            computed for each grid. `added` codes are learned, as wide as a slot, and added to it; initially, they are
            normal with variance 1 / slot_dim.
        grid: (h, w) on which the first three are defined.
        slot_dim: width of a slot, for `added`.
    """

    def __init__(self, kind: PositionKind, grid: tuple[int, int], slot_dim: int = 1) -> None:
        super().__init__()
        self.kind = kind
        self.grid = grid
        self.channels = _CHANNELS.get(kind, slot_dim)
        shape = (self.channels, *grid)
        self.table: nn.Parameter | None = None
        if kind == "learned":
            self.table = nn.Parameter(nn.init.xavier_uniform_(torch.empty(shape)))
        elif kind == "added":
            self.table = nn.Parameter(torch.randn(shape) * slot_dim**-0.5)

    def forward(self, grid: tuple[int, int], like: Tensor) -> Tensor:
        """Return positions (channels, h, w) with the device and dtype of `like`."""
        if self.kind == "linear":
            return linear_positions(grid, like)
        stored = self.table if self.table is not None else sine_positions(self.grid, like)
        if grid == self.grid:
            return stored
        # as in DINOSAVi, so that a head runs on other grids than that of its training
        return F.interpolate(stored[None], grid, mode="bicubic")[0]
