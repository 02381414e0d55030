"""Decoders of slots: each predicts features on the whole grid, and a mask for each slot."""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinoseg.extensions.slots.head.positions import Positions
from dinoseg.extensions.slots.head.transformer import SlotBlock, mlp, zero_biases
from dinoseg.utils.precision import at_least_float32

DecoderKind = Literal["mlp", "slot_mixer"]


class Decoded(NamedTuple):
    """Features and masks decoded from all slots together."""

    features: Tensor  # (B, C, h, w)
    alpha: Tensor  # (B, S, h, w), sums to 1 over the slots
    similarity: Tensor | None  # (B, num_cells, h, w) logits


class SlotDecoder(nn.Module):
    """MLP shared by all slots and cells, on the cell's position and the slot (Seitzer et al., 2209.14860).

    Positions of kind `added` are added to the slot (martius-lab/slotcontrast, slotcontrast/modules/decoders.py); others
    are concatenated with it.

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
        depth: linear layers, 2 or more.
        reference_init: initialise the biases to 0.
    """

    def __init__(
        self,
        slot_dim: int,
        out_dim: int,
        hidden_dim: int,
        positions: Positions,
        num_cells: int = 0,
        *,
        depth: int = 4,
        reference_init: bool = False,
    ) -> None:
        super().__init__()
        self.positions = positions
        self.out_dim = out_dim
        self.num_cells = num_cells
        in_dim = slot_dim if positions.kind == "added" else positions.channels + slot_dim
        widths = [in_dim, *[hidden_dim] * (depth - 1), out_dim + num_cells + 1]
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in zip(widths, widths[1:], strict=False))
        if reference_init:
            zero_biases(self.layers)

    def forward(self, slots: Tensor, grid: tuple[int, int], *, similarity: bool = False) -> Decoded:
        """Return the decoded slots (B, S, D) on a grid (h, w); `similarity` adds the logits over cells."""
        hidden = self._hidden(slots, grid)  # (B, N, S, hidden_dim)
        last: nn.Linear = self.layers[-1]  # type: ignore[assignment]
        alpha = at_least_float32(F.linear(hidden, last.weight[-1:], last.bias[-1:])).softmax(dim=2)  # (B, N, S, 1)
        # sum_s a_s (W h_s + b) = W sum_s a_s h_s + b, since sum_s a_s = 1: one product per cell, not S
        mean = (alpha.mT.to(hidden.dtype) @ hidden).squeeze(2)  # (B, N, hidden_dim)
        cells = self.num_cells if similarity else 0
        return _apply_last_layer(mean, alpha.squeeze(3), last, (self.out_dim, cells), grid)

    def _hidden(self, slots: Tensor, grid: tuple[int, int]) -> Tensor:
        first: nn.Linear = self.layers[0]  # type: ignore[assignment]
        position_weight = slot_weight = first.weight
        if self.positions.kind != "added":
            position_weight, slot_weight = first.weight.split([self.positions.channels, slots.shape[-1]], dim=1)
        # W [p; s] = W_p p + W_s s, and W (p + s) = W p + W s of `added`: N + B S products instead of B N S
        cell_codes = F.linear(self.positions(grid, slots).flatten(1).mT, position_weight)  # (N, hidden_dim)
        slot_codes = F.linear(slots, slot_weight, first.bias)  # (B, S, hidden_dim)
        # from here on each slot has a value for each cell; in place, since these dominate the memory
        hidden = torch.relu_(cell_codes[:, None] + slot_codes[:, None])  # (B, N, S, hidden_dim)
        for layer in self.layers[1:-1]:
            hidden = torch.relu_(layer(hidden))
        return hidden


class SlotMixer(nn.Module):
    """Decoder that mixes the slots of each cell first, and then runs an MLP once per cell, not per slot.

    Transformer blocks let the learned positions of the cells attend to the slots; a dot-product attention from the
    result to the slots gives the mask of each slot, and the mixture of slots that an MLP maps to the outputs (Sajjadi
    et al., arXiv 2206.06922; martius-lab/videosaur, videosaur/modules/decoders.py, with layer norms and added
    positions).

    Args:
        slot_dim: D.
        out_dim: C, channels of the features; 0: none.
        hidden_dim: width of the hidden layers.
        positions: position embedding of the cells, of kind `added`.
        num_cells: number of additional outputs, logits over this many cells.
        depth: linear layers of the MLP, 2 or more.
        num_blocks: transformer blocks.
    """

    def __init__(
        self,
        slot_dim: int,
        out_dim: int,
        hidden_dim: int,
        positions: Positions,
        num_cells: int = 0,
        *,
        depth: int = 5,
        num_blocks: int = 2,
    ) -> None:
        super().__init__()
        self.positions, self.out_dim, self.num_cells = positions, out_dim, num_cells
        self.norm_memory, self.norm_query, self.norm_key = (nn.LayerNorm(slot_dim) for _ in range(3))
        self.blocks = nn.ModuleList(SlotBlock(slot_dim) for _ in range(num_blocks))
        self.query, self.key = (nn.Linear(slot_dim, slot_dim, bias=False) for _ in range(2))
        self.mlp = mlp(slot_dim, hidden_dim, depth - 1)
        self.last = nn.Linear(hidden_dim, out_dim + num_cells)
        for layer in (self.query, self.key, self.last):
            nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, slots: Tensor, grid: tuple[int, int], *, similarity: bool = False) -> Decoded:
        """Return the decoded slots (B, S, D) on a grid (h, w); `similarity` adds the logits over cells."""
        cell_codes = self.positions(grid, slots).flatten(1).mT.expand(len(slots), -1, -1)  # (B, N, D)
        memory = self.norm_memory(slots)
        tokens = cell_codes
        # the paper's allocation transformer: cells learn from the slots what they show
        for block in self.blocks:
            tokens = block(tokens, memory)
        query, key = self.query(self.norm_query(tokens)), self.key(self.norm_key(slots))
        # its mixing block: the weights of the slots in a cell are the masks
        masks = at_least_float32(query @ key.mT * key.shape[-1] ** -0.5).softmax(dim=2)  # (B, N, S)
        # the MLP runs once per cell, where that of `SlotDecoder` runs S times
        hidden = self.mlp(masks.to(slots.dtype) @ slots + cell_codes)  # (B, N, hidden_dim)
        cells = self.num_cells if similarity else 0
        return _apply_last_layer(hidden, masks, self.last, (self.out_dim, cells), grid)


def _apply_last_layer(
    hidden: Tensor, masks: Tensor, last: nn.Linear, sizes: tuple[int, int], grid: tuple[int, int]
) -> Decoded:
    """Apply the last layer of a decoder to `hidden` (B, N, hidden_dim), with masks (B, N, S) on a grid (h, w).

    `sizes` are the channels of the features and of the logits over cells; 0 logits: none.
    """
    channels, cells = sizes
    count = channels + cells
    outputs = F.linear(hidden, last.weight[:count], last.bias[:count]).mT.unflatten(2, grid)  # (B, count, h, w)
    logits = outputs[:, channels:] if cells else None
    return Decoded(outputs[:, :channels], masks.mT.unflatten(2, grid), logits)
