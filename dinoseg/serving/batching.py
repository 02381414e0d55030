"""The one thread that owns the model: images of many clients in batches of one size, and calls in between."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np

logger = logging.getLogger(__name__)


@dataclass
class _Waiting:
    work: np.ndarray | Callable[[], Any]  # an image (H, W, 3) uint8, or what is called alone
    future: Future = field(default_factory=Future)
    since: float = field(default_factory=time.monotonic)


class ModelWorker:
    """Runs a model in a thread of its own, so that no two requests use it at once.

    What has waited longest is next. An image takes those of its size that wait behind it along, up to `batch_size`
    of them and `max_pixels` in all, and waits for more until it is `wait` seconds old: not longer than it would have
    waited for a busy model. What is cancelled while it waits is never computed. Where a batch fails, each of its images
    is tried alone, so that none fails for another's sake.

    Args:
        ids: images (H, W, 3) uint8 RGB of one size to their class ids (B, H, W) uint8.
        batch_size: images at most in a batch.
        wait: seconds.
        max_pixels: of all images of a batch together; a single image may have more.
        observe: told of each batch: how many images, and the seconds that the model took.
    """

    def __init__(
        self,
        ids: Callable[[Sequence[np.ndarray]], np.ndarray],
        *,
        batch_size: int,
        wait: float,
        max_pixels: int,
        observe: Callable[[int, float], None] = lambda count, seconds: None,
    ) -> None:
        self._ids, self._batch_size, self._wait = ids, batch_size, wait
        self._max_pixels, self._observe = max_pixels, observe
        self._queue: list[_Waiting] = []
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        """Return how much waits for the model."""
        return len(self._queue)

    def submit(self, image: np.ndarray) -> "Future[np.ndarray]":
        """Return the class ids (H, W) uint8 to come of an image (H, W, 3) uint8 RGB."""
        return self._put(image)

    def call(self, function: Callable[[], Any]) -> Future:
        """Return what a function is to give, called between batches: it may use the model."""
        return self._put(function)

    def stop(self) -> None:
        """Finish all that waits, and end the thread."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def _put(self, work: np.ndarray | Callable[[], Any]) -> Future:
        waiting = _Waiting(work)
        with self._changed:
            if self._stopping:
                raise RuntimeError("The model has stopped.")
            self._queue.append(waiting)
            self._changed.notify()
        return waiting.future

    def _run(self) -> None:
        while batch := self._next_batch():
            ready = [waiting for waiting in batch if waiting.future.set_running_or_notify_cancel()]
            if ready:
                self._work(ready)

    def _next_batch(self) -> list[_Waiting]:
        """Return what is to be done now, taken from the queue; nothing at the end."""
        with self._changed:
            while True:
                self._queue = [waiting for waiting in self._queue if not waiting.future.cancelled()]
                if not self._queue:
                    if self._stopping:
                        return []
                    self._changed.wait()
                    continue
                batch, full = self._alike()
                left = batch[0].since + self._wait - time.monotonic()
                if full or left <= 0 or self._stopping:
                    taken = set(map(id, batch))
                    self._queue = [waiting for waiting in self._queue if id(waiting) not in taken]
                    return batch
                self._changed.wait(left)

    def _alike(self) -> tuple[list[_Waiting], bool]:
        """Return what can be done at once with the first in the queue, and whether no more could be."""
        first = self._queue[0]
        if not isinstance(first.work, np.ndarray):
            return [first], True
        shape = first.work.shape
        most = max(1, min(self._batch_size, self._max_pixels // max(1, shape[0] * shape[1])))
        alike = [one for one in self._queue if isinstance(one.work, np.ndarray) and one.work.shape == shape]
        return alike[:most], len(alike) >= most

    def _work(self, batch: Sequence[_Waiting]) -> None:
        start = time.perf_counter()
        try:
            first = batch[0].work
            results = self._ids([one.work for one in batch]) if isinstance(first, np.ndarray) else [first()]  # type: ignore[misc]
        except Exception as error:
            if len(batch) > 1:
                for one in batch:
                    self._work([one])
                return
            batch[0].future.set_exception(error)
            return
        if isinstance(first, np.ndarray):
            self._observe(len(batch), time.perf_counter() - start)
        for one, result in zip(batch, results, strict=True):
            one.future.set_result(result)
