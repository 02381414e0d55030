"""Automatic choice of the number of loading processes, measured while the data are in use."""

import logging
import statistics
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from itertools import chain
from typing import TypeVar

from dinoseg.utils.cores import cores_here, ranks_here, share_of_cores

Workers = int | str  # number of loading processes, AUTO, or FROM_NONE
AUTO = "auto"  # found by measuring throughput, at least two
FROM_NONE = "auto, from none"  # the same, but only this process if loading takes little of the time
K = TypeVar("K")
V = TypeVar("V")
log = logging.getLogger(__name__)

FIRST = 2  # initial number of processes
_ITEMS, _SECONDS = 30, 3.0  # minimum items and seconds per measurement
_MUCH = 0.05  # share of time spent waiting, above which more processes are tried
_MANY, _MIN_MANY = 4, 16  # processes per core, and in all, above which a warning is logged
_GAIN = 1.05  # minimum speed-up, in items per second, for which more processes are used


def with_enough_workers(
    load: Callable[[Iterable[K], int], Generator[V, None, None]],
    keys: Iterable[K],
    most: int | None = None,
    clock: Callable[[], float] = time.perf_counter,
    first: int = FIRST,
) -> Generator[V, None, None]:
    """Yield the items of `load(keys, workers)` in order, whatever the number of workers.

    The number doubles while the consumer waits for items, and for as long as doubling increases the items per second; 0
    is followed by 2.

    Args:
        load: yields an item for each key, in order; it is closed and called again with the remaining keys.
        keys: what to load.
        most: largest number of workers; None: this rank's share of the machine's cores, but at least two.
        clock: returns seconds.
        first: initial number of workers; 0: this process loads.
    """
    source, under_way = iter(keys), deque[K]()  # `under_way`: keys taken by `load` whose items have not arrived

    def issued(again: list[K]) -> Iterator[K]:
        for key in chain(again, source):
            under_way.append(key)
            yield key

    most = most or max(FIRST, share_of_cores())
    search = _Search(min(first, most), most, clock)
    while True:
        again = list(under_way)
        under_way.clear()
        stream = load(issued(again), search.workers)
        search.start()
        try:
            for item in stream:
                under_way.popleft()
                search.came()
                yield item
                search.requested()
                if search.is_over():
                    break
            else:
                return
        finally:
            stream.close()


class _Search:
    """Search for the number of workers: measures throughput for one number after the other."""

    def __init__(self, workers: int, most: int, clock: Callable[[], float]) -> None:
        self.workers, self._most, self._clock = workers, most, clock
        self._fewer: tuple[int, float] | None = None  # the previous number of workers, and its items per second
        self._settled = False

    def start(self) -> None:
        """Start measuring the present number of workers; exclude the first items, which include start-up time."""
        self._skipped = max(1, 2 * self.workers)
        self._waited: list[float] = []  # seconds until an item arrived, and from then until the next was requested
        self._held: list[float] = []
        self._mark = self._begin = self._clock()

    def came(self) -> None:
        """Record the time until an item arrived."""
        self._waited.append(self._lap())

    def requested(self) -> None:
        """Record the time until the next item was requested."""
        self._held.append(self._lap())
        if self._skipped:
            self._skipped -= 1
            self._waited, self._held, self._begin = [], [], self._mark

    def is_over(self) -> bool:
        """Return whether to switch to another number of workers; if so, `workers` is updated."""
        if self._settled or len(self._held) < _ITEMS or self._mark - self._begin < _SECONDS:
            return False
        # the median, since a validation run between two items is no processing time of an item
        waited, held = sum(self._waited), len(self._held) * statistics.median(self._held)
        share, pace = waited / (waited + held), len(self._held) / (waited + held)
        if self._fewer is not None and pace < _GAIN * self._fewer[1]:
            self.workers, self._settled = self._fewer[0], True
            log.info("engine.workers=auto: more processes are not faster; back to %d.", self.workers)
            return True
        if self.workers == self._most:
            self._settled = True
            return False
        if share <= _MUCH:  # loading may become the bottleneck later, once features are cached from the second epoch on
            self._fewer, self._waited, self._held, self._begin = None, [], [], self._mark
            return False
        self._fewer, self.workers = (self.workers, pace), min(max(FIRST, 2 * self.workers), self._most)
        log.info(
            "engine.workers=auto: %.0f%% of the time is spent waiting for %s; trying %d.",
            100 * share,
            f"{self._fewer[0]} loading processes" if self._fewer[0] else "this process, which loads the data itself",
            self.workers,
        )
        return True

    def _lap(self) -> float:
        before, self._mark = self._mark, self._clock()
        return self._mark - before


def warn_of_many(workers: Workers) -> None:
    """Warn if there are more loading processes than this machine can use, even if they mostly wait."""
    ranks, cores = ranks_here(), cores_here()
    if not isinstance(workers, str) and workers * ranks > max(_MIN_MANY, _MANY * cores):
        log.warning(
            "engine.workers=%d starts %d loading processes on %d processors, each with its own memory and prefetched "
            "batches. engine.workers=auto finds the useful number.",
            *(workers, workers * ranks, cores),
        )


def more_workers(workers: Workers) -> str:
    """Return a sentence of advice on the number of loading processes, for when items are waited for."""
    if isinstance(workers, str):
        return "engine.workers=auto has tried more processes; more cores or a faster disk would help."
    return "If cores are idle, use more loading processes (engine.workers=auto finds the number)."
