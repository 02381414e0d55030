"""The spatial broadcast decoder: each slot paints the whole grid, and says how much of each cell is its own."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinoseg.models.heads.slots.positions import Positions
from dinoseg.utils.precision import at_least_float32

DEPTH = 4  # layers


class Decoded(NamedTuple):
    """What slots paint together."""

    features: Tensor  # (B, C, h, w)
    alpha: Tensor  # (B, S, h, w), over the slots it sums to 1
    similarity: Tensor | None  # (B, num_cells, h, w) logits


class SlotDecoder(nn.Module):
    """An MLP per slot and cell, the same for all, over the cell's position and the slot (Seitzer et al., 2209.14860).

    Its last output is the logit of the alpha mask, a softmax over the slots; all others are averaged over the slots
    with the alpha mask as weights. Two shortcuts give the same numbers for less. The first layer is split:
    its position part is computed once for all slots, its slot part once for all cells. The last is linear and the
    weights sum to 1, so hidden values are averaged before it, and it runs once per cell and not per slot.

    The hidden values are the memory of training: 3 x B x S x h x w x hidden_dim numbers for each frame and step, in
    float32 96 MB for 10 slots, 28 x 28 cells and 1,024 hidden values, so 11 GB for 16 clips of 7 frames.

    Args:
        slot_dim: D.
        out_dim: C, channels of the features.
        hidden_dim: width of the hidden layers.
        positions: what tells the cells apart.
        num_cells: further outputs, logits over so many cells.
    """

    def __init__(self, slot_dim: int, out_dim: int, hidden_dim: int, positions: Positions, num_cells: int = 0) -> None:
        super().__init__()
        self.positions = positions
        self.out_dim = out_dim
        self.num_cells = num_cells
        widths = [positions.channels + slot_dim, *[hidden_dim] * (DEPTH - 1), out_dim + num_cells + 1]
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in zip(widths, widths[1:], strict=False))

    def forward(self, slots: Tensor, grid: tuple[int, int], *, similarity: bool = False) -> Decoded:
        """Return what slots (B, S, D) paint on a grid (h, w); `similarity` asks for the logits over cells too."""
        hidden = self._hidden(slots, grid)  # (B, N, S, hidden_dim)
        last: nn.Linear = self.layers[-1]  # type: ignore[assignment]
        alpha = at_least_float32(F.linear(hidden, last.weight[-1:], last.bias[-1:])).softmax(dim=2)  # (B, N, S, 1)
        mean = (alpha.mT.to(hidden.dtype) @ hidden).squeeze(2)  # (B, N, hidden_dim)
        outputs = self.out_dim + similarity * self.num_cells
        painted = F.linear(mean, last.weight[:outputs], last.bias[:outputs]).mT.unflatten(2, grid)  # (B, outputs, h, w)
        return Decoded(
            painted[:, : self.out_dim],
            alpha.squeeze(3).mT.unflatten(2, grid),
            painted[:, self.out_dim :] if similarity else None,
        )

    def _hidden(self, slots: Tensor, grid: tuple[int, int]) -> Tensor:
        first: nn.Linear = self.layers[0]  # type: ignore[assignment]
        of_place, of_slot = first.weight.split([self.positions.channels, slots.shape[-1]], dim=1)
        places = F.linear(self.positions(grid, slots).flatten(1).mT, of_place)  # (N, hidden_dim)
        contents = F.linear(slots, of_slot, first.bias)  # (B, S, hidden_dim)
        hidden = torch.relu_(places[:, None] + contents[:, None])  # (B, N, S, hidden_dim)
        for layer in self.layers[1:-1]:
            hidden = torch.relu_(layer(hidden))
        return hidden
