"""Work on one image, distributed over CPU threads that each compute alone."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def threads(device: torch.device) -> Iterator[Callable[..., Iterator[Any]]]:
    """Yield a `map` whose calls share the CPU's threads; for another device it is Python's own.

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
