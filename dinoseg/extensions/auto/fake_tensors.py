"""Dry runs of a model with fake tensors, which have shapes but no data."""

import functools
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

from torch._subclasses.fake_tensor import FakeTensorMode

from dinoseg.inference.memory import PeakBytes

_FOUND = WeakSet[Any]()  # functions with an lru_cache


@contextmanager
def fake_tensor_mode() -> Iterator[PeakBytes]:
    """Create fake tensors within the block and count their bytes.

    If an `lru_cache` missed within the block (such as that of transformers' positions), it is cleared afterwards, since
    it holds fake tensors; other caches are unchanged. Blocks must not be nested.
    """
    misses = {function: function.cache_info().misses for function in _cached_functions(len(sys.modules))}
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), PeakBytes() as peak:
            yield peak
    finally:
        for function in _cached_functions(len(sys.modules)):
            if function.cache_info().misses != misses.get(function, 0):
                function.cache_clear()


@functools.lru_cache(maxsize=1)
def _cached_functions(modules: int) -> WeakSet[Any]:
    """Return all functions with an `lru_cache`; the slow search is repeated only after further imports.

    Functions hidden by `gc.freeze` are returned only if an earlier call found them.
    """
    # by type: `isinstance` reads `__class__`, and some objects then emit warnings
    found = (each for each in gc.get_objects() if type(each) is functools._lru_cache_wrapper)
    for each in found:
        if each is not _cached_functions and not each.__module__.startswith("torch."):
            _FOUND.add(each)
    return _FOUND
