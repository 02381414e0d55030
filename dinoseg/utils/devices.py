"""What accelerators (CUDA, MPS) have in common and a CPU lacks: queued work, and an allocator that caches."""

from typing import Any

import torch


def synchronize(device: torch.device) -> None:
    """Wait until an accelerator has done the work queued so far; a CPU has none."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()


def empty_cache(device: torch.device) -> None:
    """Return memory that the allocator of an accelerator caches to the system."""
    if device.type != "cpu":
        torch.get_device_module(device).empty_cache()


def timing_event(device: torch.device) -> Any:
    """Record an event on an accelerator's stream; `start.elapsed_time(end)` gives the milliseconds between two."""
    event = torch.get_device_module(device).Event(enable_timing=True)
    event.record()
    return event
