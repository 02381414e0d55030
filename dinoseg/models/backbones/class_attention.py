"""What the class token attends to: one row of an attention matrix, taken while a block runs in its own way."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def class_weights(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Return the softmax weights (B, heads, N), float32, of the first token over all N.

    The fused kernels that blocks attend with do not give them; one row costs 1 / N of the matrix. No gradient passes:
    within a block that is recomputed in the backward pass, what nobody computes again may not be on the graph.

    Args:
        query: (B, heads, N, C), with all that the block does to it: norms, rotary positions.
        key: the same.
        scale: of their products.
    """
    with torch.autocast(query.device.type, enabled=False):  # which would multiply in half precision
        logits = scale * query[:, :, :1].float() @ key.float().transpose(-2, -1)  # (B, heads, 1, N)
        return logits.softmax(dim=-1)[:, :, 0]


def on_patches(weights: Tensor, num_prefix: int, grid: torch.Size) -> Tensor:
    """Return weights over all tokens as maps (B, heads, h, w), without those of the first `num_prefix` tokens."""
    return weights[..., num_prefix:].unflatten(-1, grid)


@contextmanager
def watch_transformers(attention: Any) -> Iterator[list[Tensor]]:
    """Collect `class_weights` from an attention module of transformers at each call within the block.

    It has to attend with the function of `attention.mask_queries_only`, which calls `show`.
    """
    rows: list[Tensor] = []
    attention.watcher = lambda query, key, scale: rows.append(class_weights(query, key, scale))
    try:
        yield rows
    finally:
        del attention.watcher


def show(attention: Any, query: Tensor, key: Tensor, scale: float) -> None:
    """Let whoever watches this attention module see its queries and keys."""
    if hasattr(attention, "watcher"):
        attention.watcher(query, key, scale)


def plain_attention(model: Any) -> Any:
    """Return the attention module of the last block of a timm model, or None where `watch_timm` cannot serve.

    It can where a plain vision transformer has a class token and attends in timm's plain way.
    """
    from timm.models.vision_transformer import Attention, VisionTransformer

    if not isinstance(model, VisionTransformer) or not model.has_class_token:
        return None
    attention = getattr(model.blocks[-1], "attn", None)
    return attention if type(attention) is Attention else None  # others subtract, rotate or mask


@contextmanager
def watch_timm(attention: Any) -> Iterator[list[Tensor]]:
    """Collect `class_weights` from timm's plain attention module at each call within the block."""
    rows: list[Tensor] = []

    def watch(_module: nn.Module, _inputs: object, projected: Tensor) -> None:
        query, key, _ = projected.unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, N, C)
        with torch.no_grad():
            query, key = attention.q_norm(query), attention.k_norm(key)
        rows.append(class_weights(query, key, attention.scale))

    handle = attention.qkv.register_forward_hook(watch)
    try:
        yield rows
    finally:
        handle.remove()
