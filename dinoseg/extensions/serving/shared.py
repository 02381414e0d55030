"""The model that all clients of a server share."""

import atexit
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np

from dinoseg.core.objects import MIN_SCORE, Objects
from dinoseg.extensions.serving.decoding import ImageDecoder
from dinoseg.extensions.serving.work import CheckedCalls, OutOfTime, Work, WorkCancelled
from dinoseg.extensions.tracking.tracker import Tracker
from dinoseg.segmenter.model import Model

_PLACES = 4  # images in memory at once, which bounds it however many requests wait
_POLL = 0.5  # seconds between two checks of work that waits for a place
_LAST_SECONDS = 5  # that `close` waits for the model


class SharedModel:
    """A model that serves one request at a time, whatever thread asks.

    Args:
        model: segments images.
        max_pixels: of an image, and of all layers of a multi-label mask, whose memory counts as much.
        timeout: seconds of computing for an image or a frame.
        min_score: of the objects that are returned or shown, unless a request sets another.
    """

    def __init__(self, model: Model, max_pixels: int, *, timeout: float = 60.0, min_score: float = MIN_SCORE) -> None:
        self.facts = model.facts
        self.task = model.runtime.task
        self.has_layers = self.task == "multilabel"
        self.things = model.runtime.things
        self.max_pixels = max_pixels // len(model.facts.classes) if self.has_layers else max_pixels
        self.min_score = min_score
        self._timeout = timeout
        self._runtime = model.runtime
        self._decoder = ImageDecoder(self.max_pixels, layers=len(model.facts.classes) if self.has_layers else 1)
        self._decoding = threading.Lock()
        self._computing = threading.Lock()
        self._places = threading.Semaphore(_PLACES)
        self._end = math.inf  # of all work, by `time.monotonic`

    @contextmanager
    def hold_place(self, work: Work) -> Iterator[None]:
        """Hold one of the places for images in memory: decode, segment and encode an image in this block.

        Raises:
            WorkCancelled: as `check`.
            OutOfTime: as `check`.
        """
        while not self._places.acquire(timeout=_POLL):
            self.check(work)
        try:
            self.check(work)
            yield
        finally:
            self._places.release()

    def decode(self, path: Path) -> np.ndarray:
        """Return an image (H, W, 3) uint8 RGB of a file; only with `hold_place`.

        Raises:
            UserError: if the file is no valid image.
        """
        with self._decoding:
            return self._decoder.decode(path)

    def segment(self, images: Sequence[np.ndarray], work: Work) -> np.ndarray:
        """Return the class ids (B, H, W) uint8 of images (H, W, 3) uint8 RGB of one size; of layers, (B, K, H, W).

        Raises:
            WorkCancelled: as `check`.
            OutOfTime: as `check`.
        """
        with self.compute(work, len(images)):
            return self._runtime.ids(images)

    def predict(self, image: np.ndarray, work: Work) -> tuple[np.ndarray, Objects | None]:
        """Return what `segment` does for an image, and its objects; None of a model that predicts none.

        To find the objects of a large image takes seconds. Raises errors as `segment`.
        """
        with self.compute(work):
            return self._runtime.predict([image])[0]

    def track(
        self, tracker: Tracker, frames: Sequence[np.ndarray], labels: Sequence[np.ndarray | None], work: Work
    ) -> list[np.ndarray]:
        """Return the masks of the next frames of a tracker on the model's backbone. Raises errors as `segment`."""
        with self.compute(work, len(frames)):
            return tracker.track(frames, labels)

    @contextmanager
    def compute(self, work: Work, images: int = 1) -> Iterator[None]:
        """Hold the model in this block, which an error of `check` ends. Raises errors as `segment`."""
        with self._computing:
            work.deadline = time.monotonic() + self._timeout * images
            try:
                self.check(work)
                with CheckedCalls(partial(self.check, work)):
                    yield
            finally:
                work.deadline = math.inf

    def check(self, work: Work) -> None:
        """Raise an error if work must not go on.

        Raises:
            WorkCancelled: nobody waits for its result.
            OutOfTime: the model has computed for too long, or the server stops.
        """
        if work.is_cancelled:
            raise WorkCancelled
        now = time.monotonic()
        if now > self._end:
            raise OutOfTime("The server stops. Send the file again later.")
        if now > work.deadline:
            raise OutOfTime(
                f"The model computes for more than {self._timeout:g} s per image or frame (mode.timeout). Reduce its "
                "size."
            )

    def stop(self, seconds: float) -> None:
        """End all work in a number of seconds."""
        self._end = min(self._end, time.monotonic() + seconds)

    def close(self) -> None:
        """End all work, and the process that decodes images; wait some seconds for an operation of the model.

        One that takes longer is left: the process then ends with status 0 instead of waiting for it.
        """
        self.stop(0)
        if self._computing.acquire(timeout=_LAST_SECONDS):
            self._computing.release()
        else:
            atexit.register(_exit_at_once)
        self._decoder.close()


def _exit_at_once() -> None:
    # a thread that returns from an operation of torch while Python shuts down would abort the process
    logging.shutdown()
    sys.stdout.flush()
    os._exit(0)
