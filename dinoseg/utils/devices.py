"""Common features of accelerators (CUDA, MPS) that a CPU lacks: queued work, and a caching allocator."""

import torch


def synchronize(device: torch.device) -> None:
    """Wait until an accelerator has finished its queued work; no-op on a CPU."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()


def empty_cache(device: torch.device) -> None:
    """Release the memory that an accelerator's allocator caches to the system; no-op on a CPU."""
    if device.type != "cpu":
        torch.get_device_module(device).empty_cache()
