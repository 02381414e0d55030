"""Where a cell lies, as numbers that the decoder reads beside a slot."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinoseg.errors import UserError

KINDS = ("learnt", "sine", "linear")
_CHANNELS = {"learnt": 4, "sine": 4, "linear": 2}


def linear_positions(grid: tuple[int, int], like: Tensor) -> Tensor:
    """Return (2, h, w): row, then column, from -1 at the first to 1 at the last."""
    lines = (torch.linspace(-1, 1, cells, device=like.device, dtype=like.dtype) for cells in grid)
    return torch.stack(torch.meshgrid(*lines, indexing="ij"))


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
        if kind not in KINDS:
            raise UserError(f"head.positions={kind} is unknown. Choose one of {', '.join(KINDS)}.")
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
