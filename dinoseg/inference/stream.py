"""Three-stage pipeline (read, model, write): concurrent, ordered, with bounded queues between the stages."""

import math
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from enum import Enum
from typing import Generic, TypeVar

import numpy as np

from dinoseg.report.progress import measure_waits
from dinoseg.utils.waiting import Wait

Read = TypeVar("Read")
Done = TypeVar("Done")
T = TypeVar("T")
STAGES = ("read", "model", "write")
_POLL = 0.05  # seconds between checks for a failure of another stage
_PATIENCE = 60.0  # seconds before a stage that does not respond is logged: a large file may take many
_ENDING = 10.0  # seconds for the other stages to finish their item after a failure


class _End(Enum):
    """Sentinel that follows the last item in a queue."""

    END = 0


@dataclass
class Throughput:
    """Number of items that passed a pipeline, and the wall time from the first read to the last write.

    Args:
        items: number of items written.
        seconds: wall time.
        stages: seconds per item in each stage, without waiting for other stages.
    """

    items: int
    seconds: float
    stages: dict[str, list[float]] = field(default_factory=dict)

    def report(self) -> str:
        """Return the slowest stage and each stage's latency (median and p95 per item or batch), in one line."""
        busy = {stage: sum(times) for stage, times in self.stages.items() if times}
        if not busy:
            return ""
        parts = []
        for stage in busy:
            middle, high = np.percentile(self.stages[stage], (50, 95)) * 1000
            parts.append(f"{stage} {middle:.1f} ms (p95 {high:.1f})")
        slowest = max(busy, key=lambda stage: busy[stage])
        share = min(1, busy[slowest] / self.seconds)
        return f"{', '.join(parts)}; the slowest stage is {slowest}, busy {share:.0%} of the time"


def run_pipeline(
    read: Iterable[Read], infer: Callable[[Read], Done], write: Callable[[Done], None], *, depth: int = 4
) -> Throughput:
    """Call `write(infer(item))` for each item of `read`, in order.

    `read` is iterated in one thread, `write` runs in another, and `infer` runs in the caller's thread, which owns the
    device. At most `depth` items wait before and after the model. The first exception of any stage stops all three; it
    is raised here after both threads have ended; one that hangs is left after 10 s.
    """
    start = time.perf_counter()
    pipeline: _Pipeline[Read, Done] = _Pipeline(depth)
    reader = threading.Thread(target=pipeline.guard, args=(pipeline.feed, read), name="read", daemon=True)
    writer = threading.Thread(target=pipeline.guard, args=(pipeline.drain, write), name="write", daemon=True)
    reader.start()
    writer.start()
    pipeline.guard(pipeline.transform, infer)
    for thread in (reader, writer):
        pipeline.guard(pipeline.join, thread)  # Ctrl-C here stops the stages, too
    for thread in (reader, writer):
        thread.join(_ENDING)
    if pipeline.error is not None:
        raise pipeline.error
    return Throughput(pipeline.written, time.perf_counter() - start, pipeline.times)


class _Pipeline(Generic[Read, Done]):
    def __init__(self, depth: int) -> None:
        self.error: BaseException | None = None
        self.written = 0
        self.times: dict[str, list[float]] = {stage: [] for stage in STAGES}
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._read: queue.Queue[Read | _End] = queue.Queue(depth)
        self._done: queue.Queue[Done | _End] = queue.Queue(depth)

    def guard(self, stage: Callable[[T], None], argument: T) -> None:
        try:
            stage(argument)
        except BaseException as error:  # KeyboardInterrupt too must stop the other stages
            with self._lock:
                self.error = self.error or error
            self._stop.set()

    def feed(self, read: Iterable[Read]) -> None:
        for item in measure_waits(read, self.times["read"].append):
            if not self._put(self._read, item):
                return
        self._put(self._read, _End.END)

    def transform(self, infer: Callable[[Read], Done]) -> None:
        for item in self._items(self._read, "read"):
            with self._measure_stage("model"):
                done = infer(item)
            if not self._put(self._done, done, "written"):
                return
        self._put(self._done, _End.END, "written")

    def drain(self, write: Callable[[Done], None]) -> None:
        for item in self._items(self._done):
            with self._measure_stage("write"):
                write(item)
            self.written += 1

    def join(self, thread: threading.Thread) -> None:
        """Wait until a stage has ended, or one has failed."""
        for _ in self._polls("written"):
            thread.join(_POLL)
            if not thread.is_alive():
                return

    @contextmanager
    def _measure_stage(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.times[stage].append(time.perf_counter() - start)

    def _items(self, source: queue.Queue[T | _End], missing: str = "") -> Iterator[T]:
        item = self._get(source, missing)
        while not isinstance(item, _End):
            yield item
            item = self._get(source, missing)

    def _get(self, source: queue.Queue[T | _End], missing: str) -> T | _End:
        for _ in self._polls(missing):
            with suppress(queue.Empty):
                return source.get(timeout=_POLL)
        return _End.END

    def _put(self, target: queue.Queue[T | _End], item: T | _End, missing: str = "") -> bool:
        for _ in self._polls(missing):
            with suppress(queue.Full):
                target.put(item, timeout=_POLL)
                return True
        return False

    def _polls(self, missing: str) -> Iterator[None]:
        """Yield until a stage has failed; log a long wait if `missing` names what another stage has not done."""
        wait = Wait(
            lambda seconds: (
                f"Nothing was {missing} for {seconds:.0f} s. Check whether a file or disk does not respond."
            ),
            limit=math.inf,  # a long video is read in one item
            notice=_PATIENCE,
        )
        while not self._stop.is_set():
            yield
            if missing:
                wait.check()
