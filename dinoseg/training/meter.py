"""Throughput of a training: images per second, share of time spent waiting for data, memory, time left."""

import logging
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import TypeVar

import torch
from tqdm.auto import tqdm

from dinoseg.report.progress import IN_NOTEBOOK, has_bar, measure_waits
from dinoseg.training.time_limit import TimeLimit
from dinoseg.utils.wording import count_of, in_bytes

logger = logging.getLogger(__name__)
T = TypeVar("T")
_STATUS = Path("/proc/self/status")  # Linux only; the peak in it can be reset
_BAR = "{percentage:3.0f}%|{bar:16}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
_FORMAT = _BAR.replace("{bar:16}", "{bar}") if IN_NOTEBOOK else _BAR  # a widget has a width of its own
_ON_TERMINAL, _IN_FILE = 0.5, 10.0  # seconds between two updates of the bar, or two lines
_RECENT = 32  # steps whose mean duration estimates the time left: unfrozen backbones make later steps slower
_MUCH = 0.05  # share of time spent waiting for data, above which a remedy is logged


@dataclass
class _Window:
    """Images and waiting time of a period, in seconds of the clock."""

    start: float
    images: int = 0
    waited: float = 0.0

    def rates(self, now: float) -> tuple[float, float]:
        """Return images per second, and the share of the time (0..1) spent waiting for data."""
        seconds = max(now - self.start, 1e-9)
        return self.images / seconds, self.waited / seconds


class Meter:
    """Counter of images and waiting time between two readings, which displays progress on one rank.

    A terminal shows a progress bar; if stderr is a file or a pipe, a line is logged every ten seconds.

    Args:
        done: optimizer steps done before.
        steps: optimizer steps in all.
        val_every: steps between validations, whose duration is part of the time left.
        epoch: steps in which each sample is seen once.
        device: device whose memory is reported.
        visible: whether this rank displays progress.
        limit: wall-clock limit of the training, if it has one.
        clock: returns seconds.
        terminal: whether to show a progress bar; None: if stderr is a terminal, or in a notebook.
    """

    def __init__(
        self,
        done: int,
        steps: int,
        val_every: int,
        epoch: float,
        device: torch.device,
        visible: bool,
        *,
        limit: TimeLimit | None = None,
        clock: Callable[[], float] = time.perf_counter,
        terminal: bool | None = None,
    ) -> None:
        self.device, self._visible, self._clock = device, visible, clock
        self._limit = limit
        self._start = self._step = done
        self._steps, self._val_every, self._epoch = steps, val_every, epoch
        self._has_bar = visible and (has_bar() if terminal is None else terminal)
        reset_peak_memory(device)
        self.bar = tqdm(total=steps, initial=done, disable=not self._has_bar, dynamic_ncols=True, bar_format=_FORMAT)
        self._remedy: Callable[[], str] = str
        self._trained = 0.0  # seconds of all steps but the first, which includes start-up
        self._later = _Window(0.0)  # waiting time of these steps
        self._speeds: list[float] = []  # images per second of each reading
        self._recent: deque[float] = deque(maxlen=_RECENT)  # seconds of the newest steps
        self._validated: list[float] = []  # seconds of each validation
        self._mark = self._shown = clock()
        self._row, self._status = _Window(self._mark), _Window(self._mark)

    def measure_waits(self, batches: Iterable[T], remedy: Callable[[], str]) -> Generator[T, None, None]:
        """Yield from `batches` and measure the wait for each; the remedy is logged at the end if it was long."""
        self._remedy = remedy

        def count(seconds: float) -> None:
            for window in self._windows():
                window.waited += seconds

        return measure_waits(batches, count, self._clock)

    def step(self, images: int, loss: float, rate: float) -> None:
        """Count one optimizer step over `images` images."""
        now = self._clock()
        for window in self._windows():
            window.images += images
        # the first step includes start-up, such as that of the loading processes
        if self._step == self._start:
            self._later = _Window(0.0)
        else:
            self._trained += now - self._mark
        # so its duration estimates no later one
        if self._step == self._start + 1:
            self._recent.clear()
        self._recent.append(now - self._mark)
        self._mark = now
        self._step += 1
        if self._visible and now - self._shown >= (_ON_TERMINAL if self._has_bar else _IN_FILE):
            self._show(now, loss, rate)
        self.bar.update()

    def read(self) -> dict[str, float]:
        """Return images per second, data-wait share (0..1) and peak memory in GiB since the last reading."""
        now = self._clock()
        speed, waited = self._row.rates(now)
        self._row = _Window(now)
        self._speeds.append(speed)
        memory = peak_memory(self.device) / 2**30
        return {"train/images_per_s": speed, "train/data_wait": waited, "train/memory_gib": memory}

    @contextmanager
    def measure_validation(self) -> Iterator[None]:
        """Count the time of the block as a validation, not as training; the wall-clock limit reserves time for it."""
        with nullcontext() if self._limit is None else self._limit.measure_validation():
            yield
        now = self._clock()
        self._validated.append(now - self._mark)
        self._mark = now
        # the validation counts in no speed
        self._row, self._status = _Window(now), _Window(now)

    def close(self) -> None:
        """Close the progress bar, and log the training speed and the share of time spent waiting for data.

        The speed is the median of the readings, as in cost.json.
        """
        self.bar.close()
        if not self._visible or self._step - self._start < 2:
            return
        _, waited = self._later.rates(self._trained)
        speed = f"trained {_format_speed(median(self._speeds))} images/s (median), " if self._speeds else ""
        logger.info("%swaiting for data %.1f%% of the time", speed, 100 * waited)
        if waited > _MUCH and self._trained > _IN_FILE:
            logger.warning("The training spent %.0f%% of its time waiting for data. %s", 100 * waited, self._remedy())

    def left(self) -> str:
        """Return the time left including validations, or their number as long as their duration is unknown.

        It is at most what the wall-clock limit leaves.
        """
        seconds = (self._steps - self._step) * fmean(self._recent or [0.0])
        # those at multiples of `val_every`, and the last step's
        validations = self._steps // self._val_every - self._step // self._val_every
        validations += self._step < self._steps and self._steps % self._val_every > 0
        limit = math.inf if self._limit is None else self._limit.seconds_left()
        if validations and not self._validated and seconds < limit:
            return f"{tqdm.format_interval(seconds)} and {count_of(validations, 'validation')} left"
        seconds += validations * sum(self._validated) / max(1, len(self._validated))
        return f"{tqdm.format_interval(min(seconds, limit))} left"

    def _windows(self) -> tuple[_Window, ...]:
        return self._row, self._status, self._later

    def _show(self, now: float, loss: float, rate: float) -> None:
        speed, waited = self._status.rates(now)
        self._status = _Window(now)
        self._shown = now
        figures = (
            f"epoch {self._step / self._epoch:.1f}, loss {loss:.4f}, rate {rate:.1e}, {_format_speed(speed)} images/s, "
            f"waiting for data {waited:.0%}, memory {in_bytes(peak_memory(self.device))}, {self.left()}"
        )
        if self._has_bar:
            self.bar.set_postfix_str(figures, refresh=False)
        else:
            logger.info("step %d of %d: %s", self._step, self._steps, figures)


def _format_speed(speed: float) -> str:
    """Format images per second: with one decimal, or below 1 with two significant digits."""
    return f"{speed:.1f}" if speed >= 1 else f"{speed:.2g}"


def reset_peak_memory(device: torch.device) -> None:
    """Restart the count of `peak_memory` where the system can, since jobs of a sweep share a process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif device.type == "mps":
        torch.mps.empty_cache()
    elif _STATUS.exists():
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def peak_memory(device: torch.device) -> int:
    """Return the peak memory so far in bytes: allocated on an accelerator, resident in the process otherwise.

    MPS has no peak counter. The memory held by its allocator is close to it: it is released only in a shortage.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    if _STATUS.exists():
        return _status("VmHWM")
    return _highest_resident()


def used_memory(device: torch.device) -> int:
    """Return the memory in use, counted as in `peak_memory`; on a CPU without Linux, the peak so far."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.current_allocated_memory()
    return _status("VmRSS") if _STATUS.exists() else _highest_resident()


def _status(name: str) -> int:
    lines = _STATUS.read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


def _highest_resident() -> int:
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
