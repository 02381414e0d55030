"""Spatial broadcast decoder: each slot predicts features on the whole grid, and an alpha mask."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinoseg.models.heads.slots.positions import Positions
from dinoseg.utils.precision import at_least_float32

DEPTH = 4  # layers


class Decoded(NamedTuple):
    """Features and masks decoded from all slots together."""

    features: Tensor  # (B, C, h, w)
    alpha: Tensor  # (B, S, h, w), sums to 1 over the slots
    similarity: Tensor | None  # (B, num_cells, h, w) logits


class SlotDecoder(nn.Module):
    """MLP shared by all slots and cells, on the cell's position and the slot (Seitzer et al., 2209.14860).

    Its last output is the logit of the alpha mask, a softmax over the slots. All other outputs are averaged over the
    slots with the alpha mask as weights. Two optimisations give the same numbers at lower cost. The first layer is
    split: its position part is computed once for all slots, its slot part once for all cells. The last layer is
    linear and the weights sum to 1, so hidden values are averaged first. The layer then runs once per cell, not per
    slot.

    The hidden values dominate training memory: 3 x B x S x h x w x hidden_dim numbers for each frame and step. In
    float32, 10 slots, 28 x 28 cells and 1,024 hidden values take 96 MB, so 16 clips of 7 frames take 11 GB.

    Args:
        slot_dim: D.
        out_dim: C, channels of the features.
        hidden_dim: width of the hidden layers.
        positions: position embedding of the cells.
        num_cells: number of additional outputs, logits over this many cells.
    """

    def __init__(self, slot_dim: int, out_dim: int, hidden_dim: int, positions: Positions, num_cells: int = 0) -> None:
        super().__init__()
        self.positions = positions
        self.out_dim = out_dim
        self.num_cells = num_cells
        widths = [positions.channels + slot_dim, *[hidden_dim] * (DEPTH - 1), out_dim + num_cells + 1]
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in zip(widths, widths[1:], strict=False))

    def forward(self, slots: Tensor, grid: tuple[int, int], *, similarity: bool = False) -> Decoded:
        """Return the decoded slots (B, S, D) on a grid (h, w); `similarity` adds the logits over cells."""
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
        of_position, of_slot = first.weight.split([self.positions.channels, slots.shape[-1]], dim=1)
        places = F.linear(self.positions(grid, slots).flatten(1).mT, of_position)  # (N, hidden_dim)
        contents = F.linear(slots, of_slot, first.bias)  # (B, S, hidden_dim)
        hidden = torch.relu_(places[:, None] + contents[:, None])  # (B, N, S, hidden_dim)
        for layer in self.layers[1:-1]:
            hidden = torch.relu_(layer(hidden))
        return hidden
