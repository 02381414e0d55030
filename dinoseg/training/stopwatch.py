"""How long parts of training take on the device that they run on."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_MOST = 1000  # spans that are kept before they are added up


class Stopwatch:
    """Adds up the seconds of spans, on a CUDA device by its own clock, without waiting for it in between."""

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._seconds = 0.0
        self._spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the time of the block."""
        start = self._event() if self._on_cuda else time.perf_counter()
        yield
        if isinstance(start, float):
            self._seconds += time.perf_counter() - start
            return
        self._spans.append((start, self._event()))
        if len(self._spans) > _MOST:
            self.read()

    def read(self) -> float:
        """Return the seconds so far."""
        for start, end in self._spans:
            end.synchronize()
            self._seconds += start.elapsed_time(end) / 1000
        self._spans.clear()
        return self._seconds

    def _event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
