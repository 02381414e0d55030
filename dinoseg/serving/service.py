"""The segmentation service of both server modes: an image in, its class ids out, limited and counted."""

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
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
from dinoseg.serving.metrics import Metrics
from dinoseg.serving.requests import bounded, read_upload

T = TypeVar("T")
_CODERS = 4  # threads that encode images: Pillow releases the GIL
_HELD = 16  # pixels in memory at once, in images of `max_pixels`
_LAST_DECODED = 3.0  # seconds after a stop signal in which images are still decoded


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
        self._pixels = _Held(_HELD * limits.max_pixels)
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
                ids = await unless_gone(request, asyncio.wrap_future(self.worker.submit(image)))
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


class _Held:
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


async def unless_gone(request: Request, answer: Awaitable[T]) -> T:
    """Return an answer, or cancel it when the client disconnects after its request was read.

    Raises:
        HungUp: if the client has disconnected.
    """
    waiting, gone = asyncio.ensure_future(answer), asyncio.ensure_future(_gone(request))
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


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _busy(what: str) -> Refused:
    return Refused(503, "busy", f"The server {what}. Try again later.", retry_after=1)
