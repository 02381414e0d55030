"""As many loading processes as bring more data, found by measuring while the data are used."""

import logging
import statistics
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from itertools import chain
from typing import TypeVar

from dinoseg.utils.cores import cores_here, ranks_here, share_of_cores

Workers = int | str  # loading processes: a number, AUTO, or FROM_NONE
AUTO = "auto"  # as many as bring more, two at least
FROM_NONE = "auto, from none"  # the same, but only this process where loading takes little of the time
K = TypeVar("K")
V = TypeVar("V")
log = logging.getLogger(__name__)

FIRST = 2  # processes to begin with
_ITEMS, _SECONDS = 30, 3.0  # that a measurement takes at least
_MUCH = 0.05  # of the time waiting, above which more processes are tried
_MANY, _LEAST_MANY = 4, 16  # processes for each core, and in all, above which they are too many
_GAIN = 1.05  # times as many items a second, below which more processes are not kept


def with_enough_workers(
    load: Callable[[Iterable[K], int], Generator[V, None, None]],
    keys: Iterable[K],
    most: int | None = None,
    clock: Callable[[], float] = time.perf_counter,
    first: int = FIRST,
) -> Generator[V, None, None]:
    """Yield what `load(keys, workers)` gives, in order, however many workers that are.

    Their number doubles while items are waited for, and as long as that brings more items a second; after none come
    two.

    Args:
        load: gives an item for each key, in order; it is closed and called anew, with the keys that are left.
        keys: what to load.
        most: workers at most; None: this rank's share of the machine's cores, but two at least.
        clock: gives seconds.
        first: workers to begin with; 0: this process loads by itself.
    """
    source, under_way = iter(keys), deque[K]()  # and the keys that were taken, of items that have not come

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
                search.asked()
                if search.is_over():
                    break
            else:
                return
        finally:
            stream.close()


class _Search:
    """How fast items come and are used, with one number of workers after the other."""

    def __init__(self, workers: int, most: int, clock: Callable[[], float]) -> None:
        self.workers, self._most, self._clock = workers, most, clock
        self._fewer: tuple[int, float] | None = None  # workers that were tried before, and their items a second
        self._settled = False

    def start(self) -> None:
        """Begin to measure with the present number of workers; the first items are those that they start with."""
        self._skipped = max(1, 2 * self.workers)
        self._waited: list[float] = []  # seconds until an item came, and after it until the next was asked for
        self._held: list[float] = []
        self._mark = self._begin = self._clock()

    def came(self) -> None:
        """Count the time until an item came."""
        self._waited.append(self._lap())

    def asked(self) -> None:
        """Count the time until the next one is asked for."""
        self._held.append(self._lap())
        if self._skipped:
            self._skipped -= 1
            self._waited, self._held, self._begin = [], [], self._mark

    def is_over(self) -> bool:
        """Return whether enough is known to go on with another number of workers, which `workers` then is."""
        if self._settled or len(self._held) < _ITEMS or self._mark - self._begin < _SECONDS:
            return False
        # the median: a validation between two items is no work on them
        waited, held = sum(self._waited), len(self._held) * statistics.median(self._held)
        share, pace = waited / (waited + held), len(self._held) / (waited + held)
        if self._fewer is not None and pace < _GAIN * self._fewer[1]:
            self.workers, self._settled = self._fewer[0], True
            log.info("engine.workers=auto: more processes bring no more: back to %d.", self.workers)
            return True
        if self.workers == self._most:
            self._settled = True
            return False
        if share <= _MUCH:  # which changes when features are kept from the second epoch on
            self._fewer, self._waited, self._held, self._begin = None, [], [], self._mark
            return False
        self._fewer, self.workers = (self.workers, pace), min(max(FIRST, 2 * self.workers), self._most)
        log.info(
            "engine.workers=auto: %.0f%% of the time goes into waiting for %s: trying %d.",
            100 * share,
            f"{self._fewer[0]} loading processes" if self._fewer[0] else "this process, which loads by itself",
            self.workers,
        )
        return True

    def _lap(self) -> float:
        before, self._mark = self._mark, self._clock()
        return self._mark - before


def warn_of_many(workers: Workers) -> None:
    """Tell of more loading processes than this machine's processors can do with, whatever they wait for."""
    ranks, cores = ranks_here(), cores_here()
    if not isinstance(workers, str) and workers * ranks > max(_LEAST_MANY, _MANY * cores):
        log.warning(
            "engine.workers=%d starts %d loading processes on %d processors, each with memory of its own and batches "
            "ahead. engine.workers=auto finds how many bring more.",
            *(workers, workers * ranks, cores),
        )


def more_workers(workers: Workers) -> str:
    """Return what can be done about the number of loading processes where items are waited for, as a sentence."""
    if isinstance(workers, str):
        return "engine.workers=auto has tried more processes: what is left takes more cores or a faster disk."
    return "Where cores are idle, let more processes load (engine.workers=auto finds how many)."
