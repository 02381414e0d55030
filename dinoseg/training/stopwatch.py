"""Timer for parts of a training, on the device that runs them."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from dinoseg.utils.devices import timing_event

_MOST = 1000  # spans that are stored before they are added up


class Stopwatch:
    """Sum of the durations of spans in seconds; an accelerator is timed with its own events, without waiting for it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds = 0.0
        self._spans: list[tuple[Any, Any]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Add the duration of the block."""
        on_cpu = self._device.type == "cpu"
        start = time.perf_counter() if on_cpu else timing_event(self._device)
        yield
        if on_cpu:
            self._seconds += time.perf_counter() - start
            return
        self._spans.append((start, timing_event(self._device)))
        if len(self._spans) > _MOST:
            self.read()

    def read(self) -> float:
        """Return the seconds so far."""
        for start, end in self._spans:
            end.synchronize()
            self._seconds += start.elapsed_time(end) / 1000
        self._spans.clear()
        return self._seconds
