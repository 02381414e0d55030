"""From the host to the device, without waiting."""

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the host on `device`.

    CUDA copies while the processor goes on, but only from pinned memory: it is brought there first, unless it is
    there (`pin_memory` of a loader does it ahead).
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
