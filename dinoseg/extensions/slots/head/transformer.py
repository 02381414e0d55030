"""Transformer blocks and MLPs of VideoSAUR and SlotContrast (martius-lab/slotcontrast, modules/networks.py)."""

import torch.nn.functional as F
from torch import Tensor, nn

NUM_HEADS = 4  # attention heads between slots


def zero_biases(layers: nn.Module) -> None:
    """Set the biases of all linear layers to 0."""
    for layer in layers.modules():
        if isinstance(layer, nn.Linear) and layer.bias is not None:
            nn.init.zeros_(layer.bias)


def token_encoder(in_dim: int, slot_dim: int) -> nn.Sequential:
    """Return layer norm, linear layer to 2 in_dim, ReLU and linear layer to slot_dim, for tokens (B, N, in_dim)."""
    layers = nn.Sequential(
        nn.LayerNorm(in_dim), nn.Linear(in_dim, 2 * in_dim), nn.ReLU(), nn.Linear(2 * in_dim, slot_dim)
    )
    zero_biases(layers)
    return layers


class MultiHeadAttention(nn.Module):
    """Multi-head attention whose logits are the dot products of queries and keys times sqrt(width of a head).

    Scaled dot-product attention divides by that number. The official code multiplies, because it divides the queries
    by 1 / sqrt(width); trained weights and published scores rely on it.

    Args:
        dim: width of queries, memory and output; a multiple of `NUM_HEADS`.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))
        for layer in (self.query, self.key, self.value, self.out):
            nn.init.xavier_uniform_(layer.weight)
        zero_biases(self)

    def forward(self, queries: Tensor, memory: Tensor) -> Tensor:
        """Return (B, Q, dim) for queries (B, Q, dim) and memory (B, M, dim), the source of keys and values."""
        parts = (self.query(queries), self.key(memory), self.value(memory))
        query, key, value = (part.unflatten(2, (NUM_HEADS, -1)).transpose(1, 2) for part in parts)  # (B, heads, N, C)
        # a fused kernel, where there is one, stores no weights (B, heads, Q, M)
        attended = F.scaled_dot_product_attention(query, key, value, scale=query.shape[-1] ** 0.5)
        return self.out(attended.transpose(1, 2).flatten(2))


class SlotBlock(nn.Module):
    """Pre-norm attention and MLP (ReLU, 4 dim wide), both residual; the memory is not normed.

    Args:
        dim: width of queries and memory.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm_attention, self.norm_mlp = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = MultiHeadAttention(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.ReLU(), nn.Linear(4 * dim, dim))

    def forward(self, queries: Tensor, memory: Tensor | None = None) -> Tensor:
        """Return the updated queries (B, Q, dim); without a memory (B, M, dim) they attend to one another."""
        normed = self.norm_attention(queries)
        # self-attention reads normed slots, cross-attention the memory as given: the slot mixer norms its own
        queries = queries + self.attention(normed, normed if memory is None else memory)
        return queries + self.mlp(self.norm_mlp(queries))


def mlp(dim: int, hidden_dim: int, count: int) -> nn.Sequential:
    """Return `count` linear layers of width hidden_dim, each followed by a ReLU; biases start at 0."""
    widths = [dim, *[hidden_dim] * count]
    pairs = [(nn.Linear(*pair), nn.ReLU()) for pair in zip(widths, widths[1:], strict=False)]
    layers = nn.Sequential(*(layer for pair in pairs for layer in pair))
    zero_biases(layers)
    return layers
