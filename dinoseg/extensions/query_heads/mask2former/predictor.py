"""Masked-attention decoder: each query predicts one mask and its class."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinoseg.core.shapes import MaskOutputs
from dinoseg.extensions.query_heads.mask2former.levels import Size, sine_positions, size_of, to_tokens

LAYERS = 9
LEVELS = 3


class MaskedAttentionDecoder(nn.Module):
    """Mask2Former's transformer decoder (Cheng et al., arXiv 2112.01527); modules are named as in Meta's file.

    Layers attend to strides 32, 16 and 8 in turn. A query attends only to the cells inside its current mask, or to
    all cells if the mask is empty.

    Args:
        dim: width of queries and maps.
        num_heads: a divisor of `dim`.
        feedforward_dim: hidden width of the feed-forward blocks.
        num_queries: Q.
        num_outputs: columns of the class layer.
    """

    def __init__(self, dim: int, num_heads: int, feedforward_dim: int, num_queries: int, num_outputs: int) -> None:
        super().__init__()
        blocks = range(LAYERS)
        self.transformer_cross_attention_layers = nn.ModuleList(CrossAttentionLayer(dim, num_heads) for _ in blocks)
        self.transformer_self_attention_layers = nn.ModuleList(SelfAttentionLayer(dim, num_heads) for _ in blocks)
        self.transformer_ffn_layers = nn.ModuleList(FeedForwardLayer(dim, feedforward_dim) for _ in blocks)
        self.post_norm = nn.LayerNorm(dim)
        self.query_feat = nn.Embedding(num_queries, dim)
        self.query_embed = nn.Embedding(num_queries, dim)
        self.level_embed = nn.Embedding(LEVELS, dim)
        self.class_embed = nn.Linear(dim, num_outputs)
        self.mask_embed = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(dim, dim) for _ in range(3))})
        self.reset_class_layer()

    def reset_class_layer(self) -> None:
        """Reinitialise the class layer at random, with zero biases."""
        nn.init.xavier_uniform_(self.class_embed.weight)
        nn.init.zeros_(self.class_embed.bias)

    def forward(self, levels: Sequence[Tensor], mask_features: Tensor, *, deep: bool) -> MaskOutputs:
        """Return class and mask logits of the last layer and, if `deep`, those of the queries before each layer.

        Args:
            levels: maps (B, dim, ., .) of strides 32, 16 and 8.
            mask_features: (B, dim, h, w), of stride 4.
            deep: whether to return the outputs of earlier layers.
        """
        return self.classify(self.read(levels, mask_features, deep=deep))

    def classify(self, read: Sequence[tuple[Tensor, Tensor]]) -> MaskOutputs:
        """Return the outputs, with class logits, for the queries and masks of `read`."""
        *aux, last = (MaskOutputs(self.class_embed(queries), masks) for queries, masks in read)
        return MaskOutputs(last.class_logits, last.mask_logits, aux)

    def read(self, levels: Sequence[Tensor], mask_features: Tensor, *, deep: bool) -> list[tuple[Tensor, Tensor]]:
        """Return the final queries (B, Q, dim) and mask logits (B, Q, h, w), preceded by earlier ones if `deep`."""
        batch = mask_features.shape[0]
        sizes = [size_of(level) for level in levels]
        cells = [
            to_tokens([level]) + shift for level, shift in zip(levels, self.level_embed.weight, strict=True)
        ]  # L of (B, N, dim)
        keys = [part + sine_positions(size, part.shape[-1], like=part) for part, size in zip(cells, sizes, strict=True)]
        places = self.query_embed.weight
        queries = self.query_feat.weight.expand(batch, -1, -1)  # (B, Q, dim)
        read_so_far = []
        stack = zip(
            self.transformer_cross_attention_layers,
            self.transformer_self_attention_layers,
            self.transformer_ffn_layers,
            strict=True,
        )
        # cross-attention comes first, unlike in DETR: without it, queries know nothing of the image yet
        for index, (read, mix, feed_forward) in enumerate(stack):
            level = index % LEVELS
            seen = self._masks(queries, mask_features)
            if deep:
                read_so_far.append(seen)
            blocked = self._blocked_positions(seen[1], sizes[level])
            queries = feed_forward(mix(read(queries, places, keys[level], cells[level], blocked), places))
        return [*read_so_far, self._masks(queries, mask_features)]

    def _masks(self, queries: Tensor, mask_features: Tensor) -> tuple[Tensor, Tensor]:
        queries = self.post_norm(queries)
        vectors = queries
        for index, layer in enumerate(self.mask_embed["layers"].children()):
            vectors = layer(vectors.relu() if index else vectors)
        return queries, torch.einsum("bqc,bchw->bqhw", vectors, mask_features)

    @staticmethod
    def _blocked_positions(mask_logits: Tensor, size: Size) -> Tensor:
        """Return blocked positions (B, 1, Q, N), True = blocked; rows that would be blocked in full are unblocked."""
        # detached: a threshold has no gradient
        logits = F.interpolate(mask_logits.detach(), size, mode="bilinear", align_corners=False)
        # not `logits < 0`: the sigmoid of a tiny negative logit rounds to 0.5, which Meta's code does not block
        blocked = logits.sigmoid().flatten(2) < 0.5
        # softmax of a row that is blocked in full would be nan
        return (blocked & ~blocked.all(-1, keepdim=True))[:, None]


class Attention(nn.Module):
    """Multi-head attention with the parameters of `nn.MultiheadAttention`, and one mask for all heads."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor, blocked: Tensor | None = None) -> Tensor:
        """Return (B, Q, dim); `blocked` is (B, 1, Q, N), True = not attended to."""
        parts = zip((queries, keys, values), self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3), strict=True)
        query, key, value = (
            F.linear(part, weight, bias).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part, weight, bias in parts
        )  # (B, heads, ., dim / heads)
        # no fused kernel: its different rounding moves single mask cells across the threshold, and with them whole
        # queries away from the outputs of Meta's code; with few queries the scores are small anyway
        scores = query * math.sqrt(1 / query.shape[-1]) @ key.mT  # (B, heads, Q, N)
        if blocked is not None:
            scores = scores.masked_fill(blocked, -math.inf)
        read = scores.softmax(-1) @ value
        return self.out_proj(read.transpose(1, 2).flatten(2))


class CrossAttentionLayer(nn.Module):
    """Queries attend to the cells of a level; post-norm."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.multihead_attn = Attention(dim, num_heads)
        self.norm = nn.LayerNorm(dim)

    def forward(self, queries: Tensor, places: Tensor, keys: Tensor, values: Tensor, blocked: Tensor) -> Tensor:
        """Return the updated queries (B, Q, dim)."""
        return self.norm(queries + self.multihead_attn(queries + places, keys, values, blocked))


class SelfAttentionLayer(nn.Module):
    """Queries attend to one another; post-norm."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.self_attn = Attention(dim, num_heads)
        self.norm = nn.LayerNorm(dim)

    def forward(self, queries: Tensor, places: Tensor) -> Tensor:
        """Return the updated queries (B, Q, dim)."""
        placed = queries + places
        return self.norm(queries + self.self_attn(placed, placed, queries))


class FeedForwardLayer(nn.Module):
    """Two linear layers on each query; post-norm."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(dim, hidden)
        self.linear2 = nn.Linear(hidden, dim)
        self.norm = nn.LayerNorm(dim)
        for layer in (self.linear1, self.linear2):
            nn.init.xavier_uniform_(layer.weight)

    def forward(self, queries: Tensor) -> Tensor:
        """Return the updated queries (B, Q, dim)."""
        return self.norm(queries + self.linear2(self.linear1(queries).relu()))
