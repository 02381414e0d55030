"""Attention weights of the class token, and attention keys, from queries and keys of a block that runs as usual."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Watched(NamedTuple):
    """Arguments of a call of an attention module, without gradients."""

    query: Tensor  # (B, heads, N, C)
    key: Tensor  # (B, heads, N, C)
    scale: float


@torch.no_grad()
def class_weights(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Return the softmax weights (B, heads, N), float32, of the first token over all N.

    The fused kernels of the blocks do not return weights; one row costs 1 / N of the matrix. No gradient passes:
    under activation checkpointing, tensors that the recomputation skips must not be on the graph.

    Args:
        query: (B, heads, N, C), after the block's query norm and rotary positions.
        key: (B, heads, N, C), after the same operations.
        scale: factor of the query-key products.
    """
    with torch.autocast(query.device.type, enabled=False):  # autocast would multiply in half precision
        logits = scale * query[:, :, :1].float() @ key.float().transpose(-2, -1)  # (B, heads, 1, N)
        return logits.softmax(dim=-1)[:, :, 0]


def class_maps(call: Watched, num_prefix: int, grid: torch.Size) -> Tensor:
    """Return the `class_weights` of a call as maps (B, heads, h, w), without those of the first `num_prefix` tokens."""
    return class_weights(*call)[..., num_prefix:].unflatten(-1, grid)


@contextmanager
def watch_transformers(attention: Any) -> Iterator[list[Watched]]:
    """Collect the arguments of a transformers attention module at each call within the context.

    Queries and keys include rotary positions, if the model has any. The module must use the attention function of
    `attention.mask_queries_only`, which calls `show`.
    """
    calls: list[Watched] = []
    attention.watcher = lambda query, key, scale: calls.append(Watched(query.detach(), key.detach(), scale))
    try:
        yield calls
    finally:
        del attention.watcher


def show(attention: Any, query: Tensor, key: Tensor, scale: float) -> None:
    """Pass queries and keys to the watcher of this attention module, if it has one."""
    if hasattr(attention, "watcher"):
        attention.watcher(query, key, scale)


def plain_attention(model: Any) -> Any:
    """Return the attention module of a timm model's last block, or None where `watch_timm` does not apply.

    It applies to plain vision transformers with a class token and timm's plain `Attention`.
    """
    from timm.models.vision_transformer import Attention, VisionTransformer

    if not isinstance(model, VisionTransformer) or not model.has_class_token:
        return None
    attention = getattr(model.blocks[-1], "attn", None)
    return attention if type(attention) is Attention else None  # variants subtract, rotate or mask


@contextmanager
def watch_timm(attention: Any) -> Iterator[list[Watched]]:
    """Collect what a plain timm attention module computes its weights from, at each call within the context."""
    calls: list[Watched] = []

    @torch.no_grad()
    def watch(_module: nn.Module, _inputs: object, projected: Tensor) -> None:
        query, key, _ = projected.unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, N, C)
        calls.append(Watched(attention.q_norm(query), attention.k_norm(key), attention.scale))

    handle = attention.qkv.register_forward_hook(watch)
    try:
        yield calls
    finally:
        handle.remove()


def key_maps(call: Watched, num_prefix: int, grid: torch.Size) -> Tensor:
    """Return the keys of a call as maps (B, C, h, w), heads side by side, without those of the first tokens."""
    keys = call.key.transpose(1, 2).flatten(2)  # (B, N, C)
    return keys[:, num_prefix:].mT.unflatten(-1, grid)
