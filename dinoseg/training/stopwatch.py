"""How long parts of training take on the device that they run on."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from dinoseg.utils.devices import timing_event

_MOST = 1000  # spans that are kept before they are added up


class Stopwatch:
    """Adds up the seconds of spans, on an accelerator by its own clock, without waiting for it in between."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds = 0.0
        self._spans: list[tuple[Any, Any]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the time of the block."""
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
