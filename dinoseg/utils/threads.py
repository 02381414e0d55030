"""Work on one image spread over the processor's threads, each of which works alone."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def threads(device: torch.device) -> Iterator[Callable[..., Iterator[Any]]]:
    """Give a `map` whose calls share the CPU's threads; for another device it is Python's own.

    For operations that are too short to be shared themselves: on a loaded machine threads wait for one another at the
    end of each.
    """
    count = torch.get_num_threads()
    if device.type != "cpu" or count == 1:
        yield map
        return
    try:
        with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            torch.set_num_threads(1)  # here too: what this thread shared would wait for those that are at work
            yield pool.map
    finally:
        torch.set_num_threads(count)  # to threads to come, the last call in any thread counts
