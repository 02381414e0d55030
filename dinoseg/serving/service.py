"""The segmentation service of both server modes: an image in, its class ids out, limited and counted."""

import asyncio
import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from typing import TypeVar

import numpy as np
from starlette.requests import ClientDisconnect, Request

from dinoseg.export.runtime.model import Model
from dinoseg.serving.batching import ModelWorker
from dinoseg.serving.decoding import PROCESSES, Decoders
from dinoseg.serving.limits import HungUp, Limits, Refused
from dinoseg.serving.requests import bounded, read_upload
from dinoseg.utils.wording import count_of

T = TypeVar("T")
_CODERS = 4  # threads that encode images: Pillow releases the GIL
_HELD = 16  # pixels in memory at once, in images of `max_pixels`
_LAST_DECODED = 3.0  # seconds after a stop signal in which images are still decoded


_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_IMAGES = (1, 2, 4, 8, 16, 32, 64)


class Service:
    """A model shared by many concurrent clients.

    Args:
        model: segments the images.
        limits: of one request, and of all together.
        batch_size: largest number of images in a batch.
        wait: seconds that an image waits for others of its size, where the model is idle.
        decoders: image decoders, which are left open at the end; None: the service creates and ends its own.
    """

    def __init__(
        self, model: Model, limits: Limits, *, batch_size: int, wait: float, decoders: Decoders | None = None
    ) -> None:
        self.model, self.limits = model, limits
        self.in_hand = 0
        self.stopping = False
        self.at_stop: Callable[[], None] = lambda: None  # called `_LAST_DECODED` seconds after a stop signal
        self._pixels = _PixelBudget(_HELD * limits.max_pixels)
        self._decoders, self._owns_decoders = decoders or Decoders(limits.max_pixels), decoders is None
        self._decoding = ThreadPoolExecutor(PROCESSES, thread_name_prefix="decoding")  # each waits for a process
        self._coders = ThreadPoolExecutor(_CODERS, thread_name_prefix="pictures")
        self.metrics = Metrics(lambda: len(self.worker), lambda: self.in_hand)
        self.worker = ModelWorker(
            model.runtime.ids,
            batch_size=batch_size,
            wait=wait,
            max_pixels=limits.max_pixels,
            observe=self.metrics.batch,
        )

    async def segment(self, request: Request, encode: Callable[[np.ndarray], T]) -> T:
        """Segment the image in a request, and return `encode` of its class ids (H, W) uint8.

        Raises:
            Refused: if a limit is exceeded, or the image is invalid.
            HungUp: if the client has disconnected; its remaining work is dropped.
        """
        async with self._admitted():
            data = await self.uploaded(request)
            async with self._in_time(504, "No answer within"), self._decoded(data) as image:
                ids = await unless_disconnected(request, asyncio.wrap_future(self.worker.submit(image)))
                return await self.code(lambda: encode(ids))

    async def uploaded(self, request: Request) -> bytes:
        """Return the bytes of the single file in a request, within the limits.

        Raises:
            Refused: if the file is missing or too large, or takes too long to arrive.
            HungUp: if the client has disconnected.
        """
        try:
            async with self._in_time(408, "The request did not arrive completely within"):
                return await read_upload(bounded(request, self.limits.image_mib))
        except ClientDisconnect as error:
            raise HungUp from error

    async def code(self, function: Callable[[], T]) -> T:
        """Run a function that reads or encodes in a thread, and return its result."""
        return await asyncio.get_running_loop().run_in_executor(self._coders, function)

    def announce_stop(self) -> None:
        """Report the stop in /health, and refuse images that are not decoded within `_LAST_DECODED` seconds."""
        self.stopping = True
        timer = threading.Timer(_LAST_DECODED, self._end_decoding)
        timer.daemon = True
        timer.start()

    def close(self) -> None:
        """Finish the images that wait for the model, and end all threads."""
        self.worker.stop()
        self._end_decoding()
        self._decoding.shutdown()
        self._coders.shutdown()

    def _end_decoding(self) -> None:
        self.at_stop()
        if self._owns_decoders:
            self._decoders.end()

    @asynccontextmanager
    async def _admitted(self) -> AsyncIterator[None]:
        if self.in_hand >= self.limits.queue:
            raise _busy(f"is processing {self.in_hand} requests, the limit (mode.limits.queue)")
        self.in_hand += 1
        try:
            yield
        finally:
            self.in_hand -= 1

    @asynccontextmanager
    async def _in_time(self, status: int, what: str) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(self.limits.timeout):
                yield
        except TimeoutError as error:
            most = f"{self.limits.timeout:g} s (mode.limits.timeout)"
            raise Refused(status, "timeout", f"{what} {most}. Try again later, or send a smaller file.") from error

    @asynccontextmanager
    async def _decoded(self, data: bytes) -> AsyncIterator[np.ndarray]:
        """Yield a decoded image; the number of pixels in memory at once is bounded."""
        with self._pixels.share() as admit:
            work = partial(self._decoders.decode, data, self.limits.max_pixels, admit)
            yield await asyncio.get_running_loop().run_in_executor(self._decoding, work)


class _PixelBudget:
    """Counter of the pixels in memory, with a maximum that only a single image may exceed."""

    def __init__(self, most: int) -> None:
        self._most, self._held, self._lock = most, 0, threading.Lock()

    @contextmanager
    def share(self) -> Iterator[Callable[[int], None]]:
        """Yield a function that reserves a number of pixels or refuses them.

        At the end, its pixels are released, and it refuses any further ones.
        """
        taken: int | None = 0

        def admit(pixels: int) -> None:
            nonlocal taken
            with self._lock:
                if taken is None or (self._held and self._held + pixels > self._most):
                    raise _busy("has reached its limit of pixels in memory")
                self._held, taken = self._held + pixels, taken + pixels

        try:
            yield admit
        finally:
            with self._lock:
                self._held, taken = self._held - (taken or 0), None


async def unless_disconnected(request: Request, answer: Awaitable[T]) -> T:
    """Return an answer, or cancel it when the client disconnects after its request was read.

    Raises:
        HungUp: if the client has disconnected.
    """
    waiting, gone = asyncio.ensure_future(answer), asyncio.ensure_future(_wait_for_disconnect(request))
    try:
        await asyncio.wait((waiting, gone), return_when=asyncio.FIRST_COMPLETED)
        if not waiting.done():
            raise HungUp
        return waiting.result()
    finally:
        waiting.cancel()
        gone.cancel()
        with suppress(asyncio.CancelledError):
            await gone


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _busy(what: str) -> Refused:
    return Refused(503, "busy", f"The server {what}. Try again later.", retry_after=1)


class Histogram:
    """Cumulative histogram: the number of values at or below each bound."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float) -> None:
        """Add one value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def lines(self, name: str) -> Iterator[str]:
        """Yield the histogram's lines of text."""
        total = 0
        for bound, count in zip((*self._bounds, "+Inf"), self._counts, strict=True):
            total += count
            yield f'{name}_bucket{{le="{bound}"}} {total}'
        yield f"{name}_sum {self._sum:.6f}"
        yield f"{name}_count {total}"


class Metrics:
    """Counters and histograms of a server; each method may be called from any thread.

    Args:
        waiting: returns the number of items that wait for the model.
        in_hand: returns the number of requests in progress.
    """

    def __init__(self, waiting: Callable[[], int], in_hand: Callable[[], int]) -> None:
        self._lock = threading.Lock()
        self._gauges = {
            "dinoseg_queue_length": ("Images and clips waiting for the model.", waiting),
            "dinoseg_requests_in_hand": ("Accepted requests without response.", in_hand),
        }
        self._requests: Counter[int] = Counter()
        self._errors: Counter[str] = Counter()
        self._latency, self._batches, self._model = Histogram(_SECONDS), Histogram(_IMAGES), Histogram(_SECONDS)

    def answered(self, status: int, seconds: float) -> None:
        """Count a mask request by its response's status, and the seconds that it took."""
        with self._lock:
            self._requests[status] += 1
            self._latency.add(seconds)

    def refused(self, rule: str) -> None:
        """Count a request without a mask, by the rule that it broke."""
        with self._lock:
            self._errors[rule] += 1

    def batch(self, count: int, seconds: float) -> None:
        """Count a batch by its number of images, and the seconds that the model took."""
        with self._lock:
            self._batches.add(count)
            self._model.add(seconds)

    def text(self) -> str:
        """Return all metrics as text."""
        with self._lock:
            return "\n".join(self._lines()) + "\n"

    def summary(self) -> str:
        """Return the number of requests and of each response status, in words."""
        answers = ", ".join(f"{count} x {status}" for status, count in sorted(self._requests.items()))
        return count_of(self._requests.total(), "request") + (f" ({answers})" if answers else "")

    def _lines(self) -> Iterator[str]:
        yield from _head("dinoseg_requests_total", "counter", "Requests for a mask, by response status.")
        yield from (f'dinoseg_requests_total{{code="{code}"}} {n}' for code, n in sorted(self._requests.items()))
        yield from _head("dinoseg_errors_total", "counter", "Refused requests, by violated rule.")
        yield from (f'dinoseg_errors_total{{rule="{rule}"}} {n}' for rule, n in sorted(self._errors.items()))
        for name, (what, value) in self._gauges.items():
            yield from _head(name, "gauge", what)
            yield f"{name} {value()}"
        for name, what, histogram in (
            ("dinoseg_request_seconds", "Time from the first byte of a request to its response.", self._latency),
            ("dinoseg_batch_images", "Batch size of the model.", self._batches),
            ("dinoseg_model_seconds", "Time of the model per batch.", self._model),
        ):
            yield from _head(name, "histogram", what)
            yield from histogram.lines(name)


def _head(name: str, kind: str, what: str) -> Iterator[str]:
    yield f"# HELP {name} {what}"
    yield f"# TYPE {name} {kind}"
