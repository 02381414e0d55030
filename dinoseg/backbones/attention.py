"""Attention in which only the first rows are masked."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinoseg.backbones.class_attention import show

_NAME = "dinoseg_query_mask"


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
        return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, scale=scale)
    rows = mask.shape[-2]
    masked = F.scaled_dot_product_attention(
        query[..., :rows, :], key, value, attn_mask=mask, dropout_p=dropout, scale=scale
    )
    free = F.scaled_dot_product_attention(query[..., rows:, :], key, value, dropout_p=dropout, scale=scale)
    return torch.cat([masked, free], dim=-2)


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
