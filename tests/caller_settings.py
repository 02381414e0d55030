"""Settings of torch and NumPy that a program may have when it calls dinoseg."""

from contextlib import ExitStack, contextmanager

import numpy as np
import torch


@contextmanager
def foreign_settings():
    """Set everything that changes how new tensors are made and computed, as a surrounding program may."""
    with ExitStack() as stack:
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float64)
        stack.enter_context(torch.inference_mode())
        stack.enter_context(torch.autocast("cpu", torch.bfloat16))
        stack.enter_context(torch.device("meta"))
        stack.enter_context(np.errstate(all="raise"))
        yield
