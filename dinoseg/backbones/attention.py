"""Attention in which only the first rows are masked."""

from functools import cache
from math import ceil
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinoseg.backbones.class_attention import show

_NAME = "dinoseg_query_mask"
_HELD = 2**22  # scores that `_by_products` holds at once, which stay in the processor's caches
_FEWEST = 128  # tokens for which its calls are worth their start


def mask_queries_only(model: Any) -> None:
    """Make a transformers model take attention masks that are meant for its first tokens only.

    A mask (B, 1, Q, N), bool, True = attend, then says what the first Q of N tokens see; all others see everything.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(_NAME, _attend)
    model.config._attn_implementation = _NAME


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, dropout: float, scale: float) -> Tensor:
    """Return scaled dot-product attention (B, heads, N, C) with the first Q rows masked by (B, 1, Q, N).

    Two calls over the same keys instead of one with an N x N mask: the rows of the patches, nearly all, keep the fast
    kernels, which take no mask.
    """
    if mask is None:
        return _unmasked(query, key, value, dropout, scale)
    rows = mask.shape[-2]
    masked = F.scaled_dot_product_attention(
        query[..., :rows, :], key, value, attn_mask=mask, dropout_p=dropout, scale=scale
    )
    free = _unmasked(query[..., rows:, :], key, value, dropout, scale)
    return torch.cat([masked, free], dim=-2)


def _unmasked(query: Tensor, key: Tensor, value: Tensor, dropout: float, scale: float) -> Tensor:
    """Return attention (B, heads, M, C) of M rows that see all N tokens."""
    plain = not dropout and not torch.compiler.is_compiling() and query.dtype == torch.bfloat16
    learns = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    if plain and not learns and query.device.type == "cpu" and query.shape[2] >= _FEWEST and _products_are_faster():
        return _by_products(query, key, value, scale)
    return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, scale=scale)


@cache
def _products_are_faster() -> bool:
    """Say whether this processor has fast products of bfloat16, but none that torch's fused attention uses."""
    return torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported()


def _by_products(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Return unmasked attention by matrix products, some rows at a time: about half the time of torch's in bfloat16.

    Scores are rounded to bfloat16 before the softmax, as any attention written out in bfloat16 rounds them.
    """
    attended = torch.empty_like(query)
    heads, rows = query.shape[1:3]
    parts = ceil(heads * rows * key.shape[2] / _HELD)
    for queries, keys, values, out in zip(query, key.mT, value, attended, strict=True):
        for some, place in zip(queries.chunk(parts, 1), out.chunk(parts, 1), strict=True):
            scores = torch.baddbmm(some.new_empty(1), some, keys, beta=0, alpha=scale)
            place.copy_(torch.softmax(scores, -1) @ values)
    return attended


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    **_: object,
) -> tuple[Tensor, None]:
    """Attend, with the signature that transformers calls its attention functions by."""
    show(module, query, key, scaling)
    attended = attend(query, key, value, attention_mask, dropout=dropout, scale=scaling)
    return attended.transpose(1, 2).contiguous(), None
