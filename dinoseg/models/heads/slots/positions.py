"""Where a cell lies, as numbers that the decoder reads beside a slot."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinoseg.models.heads.options import check_choice
from dinoseg.utils.errors import UserError

KINDS = ("learnt", "sine", "linear")
_CHANNELS = {"learnt": 4, "sine": 4, "linear": 2}
_APART = 1.5  # standard deviation of what a token is told of its place at first, where clusters begin by it


def training_grid(positions_grid: Sequence[int] | None, positions: str, similarity: bool) -> tuple[int, int]:
    """Return rows and columns of the cells in training, (1, 1) where nothing is made for them.

    Args:
        positions_grid: these, if they are known.
        positions: kind of positions.
        similarity: whether logits over these cells are predicted.

    Raises:
        UserError: no such pair, or none where one is needed.
    """
    if positions_grid is None and (similarity or positions != "linear"):
        user = "head.similarity=true" if similarity else f"head.positions={positions}"
        raise UserError(
            f"{user} is made for the cells of a training crop, and head.positions_grid=null. Give backbone.patch_size, "
            "from which they follow; or their rows and columns, such as head.positions_grid=[14,14]."
        )
    rows_columns = [1, 1] if positions_grid is None else positions_grid
    if len(rows_columns) != 2 or min(rows_columns) < 1:
        raise UserError(f"head.positions_grid={list(rows_columns)}: give rows and columns of cells, such as [28,28].")
    return rows_columns[0], rows_columns[1]


def linear_positions(grid: tuple[int, int], like: Tensor) -> Tensor:
    """Return (2, h, w): row, then column, from -1 at the first to 1 at the last."""
    lines = (torch.linspace(-1, 1, cells, device=like.device, dtype=like.dtype) for cells in grid)
    return torch.stack(torch.meshgrid(*lines, indexing="ij"))


def token_places(dim: int, *, clusters: bool) -> nn.Linear:
    """Return what makes a code (..., dim) of a place (..., 2) to add to a token.

    With `clusters` it weighs as much at first as channels of variance 1, so that what lies apart is told apart.
    """
    places = nn.Linear(2, dim)
    if clusters:
        nn.init.normal_(places.weight, std=_APART)
        nn.init.zeros_(places.bias)
    return places


def sine_positions(grid: tuple[int, int], like: Tensor) -> Tensor:
    """Return (4, h, w): sine and cosine of the column's number, then of the row's, in radians."""
    lines = (torch.arange(cells, device=like.device, dtype=like.dtype) for cells in grid)
    rows, columns = torch.meshgrid(*lines, indexing="ij")
    return torch.stack([columns.sin(), columns.cos(), rows.sin(), rows.cos()])


class Positions(nn.Module):
    """Positions of one kind for any grid.

    Args:
        kind: `learnt` or `sine`, made for one grid and resampled bicubically to any other; or `linear`, made for each.
        grid: (h, w) for which the first two are made.

    Raises:
        UserError: an unknown kind.
    """

    def __init__(self, kind: str, grid: tuple[int, int]) -> None:
        super().__init__()
        check_choice("positions", kind, KINDS)
        self.kind = kind
        self.grid = grid
        self.channels = _CHANNELS[kind]
        shape = (self.channels, *grid)
        self.table = nn.Parameter(nn.init.xavier_uniform_(torch.empty(shape))) if kind == "learnt" else None

    def forward(self, grid: tuple[int, int], like: Tensor) -> Tensor:
        """Return positions (channels, h, w) on the device of `like`, in its precision."""
        if self.kind == "linear":
            return linear_positions(grid, like)
        stored = self.table if self.table is not None else sine_positions(self.grid, like)
        if grid == self.grid:
            return stored
        return F.interpolate(stored[None], grid, mode="bicubic")[0]
