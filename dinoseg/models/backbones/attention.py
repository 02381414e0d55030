"""Attention with a mask on the first rows only, a faster CPU kernel for bfloat16, and weights and keys of a block.

Weights of the class token and attention keys come from the queries and keys of a block that runs as usual.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from math import ceil, prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode

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
    Every backbone of transformers computes attention in this way, with a mask or without.
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
        attended, workspace = torch.empty_like(query), _Workspace(query, key)
        for rows, all_rows in workspace.pieces:
            attended[rows] = workspace.weights(query[rows], key[all_rows], scale) @ value[all_rows]
        return attended

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # double backward would silently treat the result as a constant
            raise NotImplementedError("Attention by products cannot be differentiated twice: leave out create_graph.")
        query, key, value = ctx.saved_tensors
        of_query = torch.empty_like(query)
        workspace = _Workspace(query, key)
        of_key, of_value = (torch.zeros(part.shape, dtype=torch.float32) for part in (key, value))
        for rows, all_rows in workspace.pieces:
            weights = workspace.weights(query[rows], key[all_rows], ctx.scale)
            slopes = workspace.slopes(upstream[rows], value[all_rows], weights)
            of_query[rows] = _scaled_product(slopes, key[all_rows], ctx.scale)
            of_key[all_rows] += _scaled_product(slopes.mT, query[rows], ctx.scale)
            of_value[all_rows] += weights.mT @ upstream[rows]
        return of_query, of_key.to(key.dtype), of_value.to(value.dtype), None


class _Workspace:
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
    pass_to_watcher(module, query, key, scaling)
    attended = attend(query, key, value, attention_mask, dropout=dropout, scale=scaling)
    return attended.transpose(1, 2).contiguous(), None


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
    `attention.mask_queries_only`, which calls `pass_to_watcher`.
    """
    calls: list[Watched] = []
    attention.watcher = lambda query, key, scale: calls.append(Watched(query.detach(), key.detach(), scale))
    try:
        yield calls
    finally:
        del attention.watcher


def pass_to_watcher(attention: Any, query: Tensor, key: Tensor, scale: float) -> None:
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
