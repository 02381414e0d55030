"""Choice of a device, copies to it, and threads of a CPU that each compute alone."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dinoseg.utils.errors import UserError


def choose_device(name: str = "auto", ranks: int = 1) -> torch.device:
    """Return the device of the given name; `auto` prefers CUDA, then MPS, then the CPU.

    Args:
        name: auto, cuda, mps or cpu.
        ranks: number of ranks that share the CUDA devices of this machine, each with its own.

    Raises:
        UserError: the device is not available on this machine, or there are fewer than ranks.
    """
    have = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    there = [kind for kind, available in have.items() if available]
    if name != "auto" and name not in there:
        raise UserError(
            f"engine.device={name} is not available here. This machine has: {', '.join(there)}. To use one of several "
            "CUDA devices, set CUDA_VISIBLE_DEVICES."
        )
    chosen = torch.device(there[0] if name == "auto" else name)
    if chosen.type == "cuda" and torch.cuda.device_count() < ranks:
        raise UserError(
            f"engine.devices={ranks} needs one CUDA device each, and this machine has {torch.cuda.device_count()}. Set "
            "a lower number, or engine.device=cpu."
        )
    return chosen


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a host tensor to `device`, on CUDA without waiting for the copy.

    Only CUDA copies asynchronously, and only from pinned memory: a tensor that is not pinned yet (loaders pin their
    batches ahead) is pinned here. MPS would read host memory later, which may have been reused by then.
    """
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


@contextmanager
def threads(device: torch.device) -> Iterator[Callable[..., Iterator[Any]]]:
    """Yield a `map` whose calls, such as parts of one image, share the CPU's threads; Python's own for another device.

    It is for operations too short to run in parallel themselves. On a loaded machine, their threads would wait for one
    another at the end of each operation.
    """
    count = torch.get_num_threads()
    if device.type != "cpu" or count == 1:
        yield map
        return
    try:
        with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            torch.set_num_threads(1)  # here too: parallel operations of this thread would wait for the busy workers
            yield pool.map
    finally:
        torch.set_num_threads(count)  # new threads use the value last set in any thread
