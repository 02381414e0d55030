"""A walk through a model that computes nothing, by tensors that have shapes and no numbers."""

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
def walking(count: PeakBytes | None = None) -> Iterator[PeakBytes]:
    """Make tensors without numbers within the block, and count their bytes, by another count than the plain one.

    Cached functions that computed something within the block (transformers': positions) lose their caches, which hold
    tensors without numbers; those of other code keep theirs. Blocks are not nested.
    """
    misses = {function: function.cache_info().misses for function in _cached_functions(len(sys.modules))}
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), count or PeakBytes() as peak:
            yield peak
    finally:
        for function in _cached_functions(len(sys.modules)):
            if function.cache_info().misses != misses.get(function, 0):
                function.cache_clear()


@functools.lru_cache(maxsize=1)
def _cached_functions(modules: int) -> WeakSet[Any]:
    """Return all functions with an `lru_cache`; the search takes long, and is repeated only after further imports.

    Functions that `gc.freeze` hides are returned if an earlier call has found them.
    """
    # by type: some objects warn where they are asked for their class
    found = (each for each in gc.get_objects() if type(each) is functools._lru_cache_wrapper)
    for each in found:
        if each is not _cached_functions and not each.__module__.startswith("torch."):
            _FOUND.add(each)
    return _FOUND
