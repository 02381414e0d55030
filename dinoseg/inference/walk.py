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


@contextmanager
def walking(count: PeakBytes | None = None) -> Iterator[PeakBytes]:
    """Make tensors without numbers within the block, and count their bytes, by another count than the plain one."""
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), count or PeakBytes() as peak:
            yield peak
    finally:  # of functions that keep what they return (transformers': positions), as if these were numbers
        for function in _keepers(len(sys.modules)):
            function.cache_clear()


@functools.lru_cache(maxsize=1)
def _keepers(modules: int) -> WeakSet[Any]:
    """Return the functions that keep what they return, of so many imported modules: to look for them takes long."""
    # by type: some objects warn where they are asked for their class
    found = (each for each in gc.get_objects() if type(each) is functools._lru_cache_wrapper)
    return WeakSet(each for each in found if each is not _keepers and not each.__module__.startswith("torch."))
