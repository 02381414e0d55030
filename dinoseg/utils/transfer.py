"""Copies from host memory to the device."""

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a host tensor to `device`, on CUDA without waiting for the copy.

    Only CUDA copies asynchronously, and only from pinned memory: a tensor that is not pinned yet (loaders pin their
    batches ahead) is pinned here. MPS would read host memory later, which may have been reused by then.
    """
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
