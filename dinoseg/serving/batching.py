"""Dynamic batching: the one thread that owns the model, and runs images of many clients in batches of one size."""

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
    work: np.ndarray | Callable[[], Any]  # an image (H, W, 3) uint8, or a function that runs alone
    future: Future = field(default_factory=Future)
    since: float = field(default_factory=time.monotonic)


class ModelWorker:
    """Thread that runs a model, so that no two requests use it at once.

    The item that has waited longest is next. An image is batched with the waiting images of its size, up to
    `batch_size` images and `max_pixels` in all. It waits for further ones until it is `wait` seconds old; time spent
    waiting for a busy model counts. Items cancelled while they wait are never computed. If a batch fails, each of its
    images is tried alone, so that one image cannot fail the others.

    Args:
        ids: maps images (H, W, 3) uint8 RGB of one size to their class ids (B, H, W) uint8.
        batch_size: largest number of images in a batch.
        wait: seconds.
        max_pixels: of all images of a batch together; a single image may have more.
        observe: called after each batch with its number of images and the seconds that the model took.
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
        """Return the number of items that wait for the model."""
        return len(self._queue)

    def submit(self, image: np.ndarray) -> "Future[np.ndarray]":
        """Queue an image (H, W, 3) uint8 RGB, and return the future of its class ids (H, W) uint8."""
        return self._put(image)

    def call(self, function: Callable[[], Any]) -> Future:
        """Queue a function that runs between batches and may use the model; return the future of its result."""
        return self._put(function)

    def stop(self) -> None:
        """Finish all waiting items, and end the thread."""
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
        """Take the next batch from the queue when it is due; return an empty one at the end."""
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
        """Return the items that can share a batch with the first in the queue, and whether that batch is full."""
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
