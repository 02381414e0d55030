"""Half precision, where it is too coarse."""

import torch
from torch import Tensor


def at_least_float32(values: Tensor) -> Tensor:
    """Return half precision as float32, and all else as it is."""
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values
