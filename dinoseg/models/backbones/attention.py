"""Attention with a mask on the first rows only, and a faster CPU kernel for bfloat16."""

from collections.abc import Callable, Mapping
from functools import cache
from math import ceil, prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode

from dinoseg.models.backbones.class_attention import show

_NAME = "dinoseg_query_mask"
_HELD = 2**22  # scores per chunk in `by_products`: fits into the CPU caches
_FEWEST = 128  # tokens from which `by_products` pays off its call overhead


def register_query_mask() -> None:
    """Register the attention of `mask_queries_only` with transformers.

    Call it where the backbone's class is defined: a pickled model looks the name up in a process that builds none.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(_NAME, _attend)


def mask_queries_only(model: Any) -> None:
    """Make a transformers model accept attention masks that cover its first tokens only.

    A mask (B, 1, Q, N), bool, True = attend, restricts the first Q of N tokens; all others attend to everything.
    """
    model.config._attn_implementation = _NAME


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, dropout: float, scale: float) -> Tensor:
    """Return scaled dot-product attention (B, heads, N, C) with the first Q rows masked by (B, 1, Q, N).

    Two calls over the same keys replace one with an N x N mask: the patch rows, nearly all rows, still use the fast
    kernels, which take no mask.
    """
    if mask is None:
        return _attend_unmasked(query, key, value, dropout, scale)
    rows = mask.shape[-2]
    masked = F.scaled_dot_product_attention(
        query[..., :rows, :], key, value, attn_mask=mask, dropout_p=dropout, scale=scale
    )
    free = _attend_unmasked(query[..., rows:, :], key, value, dropout, scale)
    return torch.cat([masked, free], dim=-2)


def attend_fastest(model: nn.Module) -> None:
    """Route fused attention in timm modules through `attend` where that is faster on this CPU.

    This affects modules with the flag `fused_attn`; calls with a mask and causal calls still use torch's kernel.
    """
    if not _products_are_faster():
        return
    for module in model.modules():
        if hasattr(module, "fused_attn"):  # hooks leave the class and copies of the module unchanged
            module.register_forward_pre_hook(_enter)
            module.register_forward_hook(_leave, always_call=True)


class _Intercepted(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return (_attention if func is _TORCHS else func)(*args, **(kwargs or {}))


_TORCHS = F.scaled_dot_product_attention
_INTERCEPTED = _Intercepted()


def _is_eager() -> bool:
    """Return whether operations run eagerly: `_Products` supports neither graph capture nor `torch.func`."""
    recorded = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return not (recorded or torch._C._are_functorch_transforms_active())


def _enter(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
    of_cpu = any(isinstance(part, Tensor) and part.device.type == "cpu" for part in inputs[:1])
    if of_cpu and _is_eager() and _get_current_function_mode() is not _INTERCEPTED:  # an interrupt may leave it active
        _INTERCEPTED.__enter__()


def _leave(_module: nn.Module, _inputs: tuple[Any, ...], _output: object) -> None:
    if _is_eager() and _get_current_function_mode() is _INTERCEPTED:  # inactive if a hook before `_enter` failed
        _INTERCEPTED.__exit__(None, None, None)


def _attention(query: Tensor, key: Tensor, value: Tensor, *others: Any, **options: Any) -> Tensor:
    """Compute attention with the signature of `F.scaled_dot_product_attention`."""
    requested = {name: value for name, value in options.items() if value is not None and value is not False}
    if others or requested.keys() - {"dropout_p", "scale"}:
        return F.scaled_dot_product_attention(query, key, value, *others, **options)
    dropout, scale = requested.get("dropout_p", 0.0), requested.get("scale", query.shape[-1] ** -0.5)
    return _attend_unmasked(query, key, value, dropout, scale)


def _attend_unmasked(query: Tensor, key: Tensor, value: Tensor, dropout: float, scale: float) -> Tensor:
    """Return attention (B, heads, M, C) of M rows over all N tokens, without a mask."""
    plain = not dropout and _is_eager() and query.dim() == 4 and query.shape[2] >= _FEWEST
    alike = (
        key.shape == value.shape == (*query.shape[:-2], key.shape[-2], query.shape[-1])
    )  # no grouped queries, same C
    of_cpu = query.device.type == "cpu" and query.dtype == key.dtype == value.dtype == torch.bfloat16
    of_cpu = of_cpu and not isinstance(query, FakeTensor)  # an estimate would count each of thousands of chunks
    if not (plain and alike and of_cpu and _products_are_faster()):
        return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, scale=scale)
    return by_products(query, key, value, scale)


@cache
def _products_are_faster() -> bool:
    """Return whether this CPU has fast bfloat16 products (AVX-512) that torch's fused attention does not use."""
    return torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported()


def by_products(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Return unmasked attention (B, heads, M, C) by chunked matrix products.

    In bfloat16 it takes about half the time of torch's kernel where `_products_are_faster`. Scores are rounded before
    the softmax, as in any unfused bfloat16 attention. No M x N matrix is stored: the backward pass recomputes the
    weights, as torch's kernel does.

    Args:
        query: (B, heads, M, C).
        key: (B, heads, N, C).
        value: (B, heads, N, C).
        scale: factor of the query-key products.
    """
    return _Products.apply(query, key, value, scale)


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.scale = scale
        attended, room = torch.empty_like(query), _Room(query, key)
        for rows, all_rows in room.pieces:
            attended[rows] = room.weights(query[rows], key[all_rows], scale) @ value[all_rows]
        return attended

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # double backward would silently treat the result as a constant
            raise NotImplementedError("Attention by products cannot be differentiated twice: leave out create_graph.")
        query, key, value = ctx.saved_tensors
        of_query = torch.empty_like(query)
        room = _Room(query, key)
        of_key, of_value = (torch.zeros(part.shape, dtype=torch.float32) for part in (key, value))
        for rows, all_rows in room.pieces:
            weights = room.weights(query[rows], key[all_rows], ctx.scale)
            slopes = room.slopes(upstream[rows], value[all_rows], weights)
            of_query[rows] = _scaled_product(slopes, key[all_rows], ctx.scale)
            of_key[all_rows] += _scaled_product(slopes.mT, query[rows], ctx.scale)
            of_value[all_rows] += weights.mT @ upstream[rows]
        return of_query, of_key.to(key.dtype), of_value.to(value.dtype), None


class _Room:
    """Chunks of heads (or rows) of an image, and a workspace for their scores; reuse avoids the cost of fresh pages.

    A chunk holds a few heads. If the scores of one head exceed the budget, it holds some of its rows; products of few
    rows are slow.

    Args:
        query: (B, heads, M, C).
        key: (B, heads, N, C).
    """

    def __init__(self, query: Tensor, key: Tensor) -> None:
        images, heads, rows = query.shape[:3]
        self._tokens = key.shape[2]
        heads_at_once = max(1, _HELD // (rows * self._tokens))
        rows_at_once = ceil(rows / ceil(rows * self._tokens / _HELD))
        whole = [(image, some) for image in range(images) for some in _runs(heads, heads_at_once)]
        self.pieces = [((*of_heads, some), of_heads) for of_heads in whole for some in _runs(rows, rows_at_once)]
        self._memory = [query.new_empty(0)] * 3

    def weights(self, queries: Tensor, keys: Tensor, scale: float) -> Tensor:
        """Return the softmax weights of rows (heads, M, C) over the keys (heads, N, C)."""
        return torch.softmax(
            _scaled_product(queries, keys.mT, scale, out=self._of(0, queries)), -1, out=self._of(1, queries)
        )

    def slopes(self, upstream: Tensor, values: Tensor, weights: Tensor) -> Tensor:
        """Return the gradient of the scaled products, given the gradient of the attention output."""
        of_weights = torch.bmm(upstream, values.mT, out=self._of(0, upstream))
        into = self._of(2, upstream)
        return torch.ops.aten._softmax_backward_data.out(of_weights, weights, -1, weights.dtype, grad_input=into)

    def _of(self, number: int, rows: Tensor) -> Tensor:
        """Return one of the three workspace buffers, viewed as (heads, M, N)."""
        shape = *rows.shape[:2], self._tokens
        if not len(self._memory[number]):  # the first piece is the largest
            self._memory[number] = rows.new_empty(prod(shape))
        return self._memory[number][: prod(shape)].view(shape)


def _runs(length: int, at_once: int) -> list[slice]:
    return [slice(start, start + at_once) for start in range(0, length, at_once)]


def _scaled_product(left: Tensor, right: Tensor, scale: float, out: Tensor | None = None) -> Tensor:
    return torch.baddbmm(left.new_empty(1), left, right, beta=0, alpha=scale, out=out)


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
    """Compute attention with the signature of transformers' attention functions."""
    show(module, query, key, scaling)
    attended = attend(query, key, value, attention_mask, dropout=dropout, scale=scaling)
    return attended.transpose(1, 2).contiguous(), None
