"""Isolation from the settings of torch and NumPy that a surrounding program has changed."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch

_KINDS = ("cpu", "cuda", "mps")  # of devices that have an autocast of their own


@contextmanager
def default_settings() -> Iterator[None]:
    """Compute as in a new process within the block, and restore the caller's settings after it.

    New tensors are float32 on the CPU and record gradients; there is neither autocast nor inference mode, and NumPy's
    floating-point errors raise nothing. Settings that choose between correct algorithms stay: threads, deterministic
    algorithms, TF32, and those of cuDNN.
    """
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.inference_mode(False), torch.enable_grad(), default_precision_and_device():
            with np.errstate(divide="warn", over="warn", under="ignore", invalid="warn"):
                yield
    finally:
        torch.set_default_dtype(dtype)


@contextmanager
def default_precision_and_device() -> Iterator[None]:
    """Leave autocast, and create tensors on the CPU, within the block; other threads are not affected."""
    with ExitStack() as stack:
        for kind in _KINDS:
            if torch.is_autocast_enabled(kind):
                # an inner autocast would read casts of older weights: the cache is cleared with the outermost one
                stack.enter_context(torch.autocast(kind, enabled=False, cache_enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield
