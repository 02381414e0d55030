"""How fast a run goes: images per second, the share of time spent waiting for data, memory, time left."""

import resource
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import torch
from tqdm import tqdm

T = TypeVar("T")
_STATUS = Path("/proc/self/status")  # of Linux: its peak can be reset


class Meter:
    """Counts images and waiting time between two readings, and draws the progress bar on one rank."""

    def __init__(self, done: int, steps: int, device: torch.device, visible: bool) -> None:
        self.device = device
        reset_peak_memory(device)
        self.bar = tqdm(total=steps, initial=done, unit="step", disable=not visible, dynamic_ncols=True)
        self._restart()

    def waiting(self, batches: Iterable[T]) -> Iterator[T]:
        """Yield from `batches`, counting the time until each comes."""
        iterator = iter(batches)
        while True:
            asked = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self.waited += time.perf_counter() - asked
            yield batch

    def step(self, images: int, loss: float) -> None:
        """Count one optimizer step of so many images."""
        self.images += images
        self.bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
        self.bar.update()

    def read(self) -> dict[str, float]:
        """Return images per second, data-wait share (0..1) and peak memory in GiB since the last reading."""
        seconds = time.perf_counter() - self.started
        values = {
            "train/images_per_s": self.images / seconds,
            "train/data_wait": self.waited / seconds,
            "train/memory_gib": peak_memory(self.device) / 2**30,
        }
        self.bar.set_postfix_str(
            f"{self.bar.postfix or ''}, {values['train/images_per_s']:.1f} img/s, "
            f"data {values['train/data_wait']:.0%}, {values['train/memory_gib']:.1f} GiB"
        )
        self._restart()
        return values

    def pause(self) -> None:
        """Forget the time since the last reading: something else than training took it."""
        self._restart()

    def close(self) -> None:
        """Leave the bar as it stands."""
        self.bar.close()

    def _restart(self) -> None:
        self.images, self.waited, self.started = 0, 0.0, time.perf_counter()


def reset_peak_memory(device: torch.device) -> None:
    """Let `peak_memory` count from here on, where the system can: jobs of a sweep share a process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif _STATUS.exists():
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int:
    """Return the highest memory so far in bytes: allocated on a CUDA device, resident in the process otherwise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if _STATUS.exists():
        return 1024 * int(
            next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM")).split()[1]
        )
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
