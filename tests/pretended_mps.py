"""An MPS device that is none: `pretended_cuda.py` with what torch 2.9 refuses on MPS, and what it leaves to the CPU.

Both are from torch 2.9.0 for macOS: the dispatch keys in its `native_functions.yaml`, and the checks of its library.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
from pretended_cuda import MPS, Place, Pretended, _Event, aten, is_pinned, pretended_device
from torch import Tensor

_WIDE = (torch.float64, torch.complex128)
# without an MPS kernel in torch 2.9; those that a segmenter might come to use
MISSING = {
    *(aten.grid_sampler_2d_backward, aten.grid_sampler_3d_backward, aten.native_group_norm_backward),
    *(aten._upsample_bilinear2d_aa_backward, aten._upsample_bicubic2d_aa_backward, aten.adaptive_max_pool3d),
    *(aten._linalg_eigh, aten._linalg_svd, aten.linalg_qr, aten.linalg_lstsq, aten.linalg_matrix_exp),
    *(aten._embedding_bag, aten._cdist_backward, aten._int_mm, aten._unique, aten.unique_dim, aten.nonzero_static),
    *(aten.take, aten.put_, aten.vdot, aten.index_reduce, aten.mode, aten.heaviside, aten.frexp, aten.poisson),
    *(aten.col2im, aten.to_sparse, aten._coalesce, aten.segment_reduce, aten._fused_adagrad_),
}
_BICUBIC, _BORDER = 2, 1  # of grid_sampler_2d


class _TimedEvent(_Event):
    def __init__(self, calls: Counter[str], *, enable_timing: bool) -> None:
        assert enable_timing
        self._calls = calls

    def elapsed_time(self, end: Any) -> float:
        """Return half a second, in milliseconds."""
        self._calls["elapsed_time"] += 1
        return 500.0


class RefusedByMps(AssertionError):
    """MPS would refuse this, or give garbage."""


class Mps(Place):
    """Refuses what MPS does, and counts in `fallbacks` which operators the CPU would compute instead."""

    device = MPS

    def __init__(self) -> None:
        self.fallbacks: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()  # of functions of torch.mps

    def check(self, func: Any, args: Any, kwargs: Any) -> None:
        """Refuse interpolations and paddings that MPS lacks, and unsafe copies."""
        name = func.overloadpacket
        if name in MISSING:
            self.fallbacks[name.__name__] += 1
        if name is aten.grid_sampler_2d and (args[2] == _BICUBIC or args[3] == _BORDER):
            raise RefusedByMps("MPS: Unsupported Border padding mode, or bicubic interpolation")
        if kwargs.get("dtype") in _WIDE:
            raise RefusedByMps("Cannot convert a MPS Tensor to float64 dtype")
        if name is aten.copy_ and not all(isinstance(each, Pretended) for each in args[:2]):
            self.copy(args[1], args[0].dtype, bool(len(args) > 2 and args[2] or kwargs.get("non_blocking")))

    def hold(self, value: Tensor) -> Tensor:
        """Refuse numbers of double precision."""
        if value.dtype in _WIDE:
            raise RefusedByMps("Cannot convert a MPS Tensor to float64 dtype")
        return value

    def copy(self, source: Tensor, dtype: torch.dtype, asynchronous: bool) -> None:
        """Refuse copies that change the type to float64 on the way, and those that read or write host memory later."""
        if dtype in _WIDE:
            raise RefusedByMps("Cannot convert a MPS Tensor to float64 dtype")
        if asynchronous and not is_pinned(source):
            raise RefusedByMps("non_blocking=True of memory that is not pinned: it may be reused before it is read")


@contextmanager
def pretended_mps() -> Iterator[Mps]:
    """Let MPS be there, as far as Python can see."""
    place = Mps()

    def count_calls(name: str, result: Any = None) -> Any:
        def call(*_: Any) -> Any:
            place.calls[name] += 1
            return result

        return call

    patches = {name: count_calls(name) for name in ("synchronize", "empty_cache", "set_rng_state")}
    patches |= {name: count_calls(name, 0) for name in ("driver_allocated_memory", "current_allocated_memory")}
    patches |= {
        "recommended_max_memory": count_calls("recommended_max_memory", 2**34),
        "Event": partial(_TimedEvent, place.calls),
    }
    patches |= {"get_rng_state": count_calls("get_rng_state", torch.zeros(0))}
    with ExitStack() as stack:
        for name, stand_in in patches.items():
            stack.enter_context(mock.patch.object(torch.mps, name, stand_in, create=True))
        stack.enter_context(mock.patch.object(torch.backends.mps, "is_available", lambda: True))
        stack.enter_context(pretended_device(place))
        yield place
