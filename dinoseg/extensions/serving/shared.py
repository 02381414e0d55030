"""The model that all clients of a server share."""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dinoseg.core.objects import Objects
from dinoseg.extensions.serving.decoding import ImageDecoder
from dinoseg.extensions.tracking.tracker import Tracker
from dinoseg.segmenter.model import Model

_DECODED = 4  # images in memory at once, which bounds it however many requests wait


class SharedModel:
    """A model that serves one request at a time, whatever thread asks.

    Args:
        model: segments images.
        max_pixels: of an image, and of all layers of a multi-label mask, whose memory counts as much.
    """

    def __init__(self, model: Model, max_pixels: int) -> None:
        self.facts = model.facts
        self.task = model.runtime.task
        self.has_layers = self.task == "multilabel"
        self.things = model.runtime.things
        self.max_pixels = max_pixels // len(model.facts.classes) if self.has_layers else max_pixels
        self._runtime = model.runtime
        self._decoder = ImageDecoder(self.max_pixels, layers=len(model.facts.classes) if self.has_layers else 1)
        self._decoding = threading.Lock()
        self._computing = threading.Lock()
        self._decoded = threading.Semaphore(_DECODED)

    def segment_file(self, path: Path) -> np.ndarray:
        """Return the class ids (H, W) uint8 of an image, or its layers (K, H, W).

        Raises:
            UserError: if the file is no valid image.
        """
        mask: np.ndarray = self._process_file(path, self._runtime.ids)[1]
        return mask

    def predict_file(self, path: Path) -> tuple[np.ndarray, np.ndarray, Objects | None]:
        """Return an image (H, W, 3) uint8 RGB, what `segment_file` does, and its objects.

        There are no objects (None) of a model that predicts none. To find those of a large image takes seconds.

        Raises:
            UserError: as `segment_file`.
        """
        image, (mask, objects) = self._process_file(path, self._runtime.predict)
        return image, mask, objects

    def _process_file(self, path: Path, process: Callable[[list[np.ndarray]], Any]) -> tuple[np.ndarray, Any]:
        """Return an image (H, W, 3) uint8 RGB, and the result of `process` for it."""
        with self._decoded:
            with self._decoding:
                image = self._decoder.decode(path)
            with self._computing:
                return image, process([image])[0]

    def segment(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Return the class ids (B, H, W) uint8 of images (H, W, 3) uint8 RGB of one size; of layers, (B, K, H, W)."""
        with self._computing:
            return self._runtime.ids(images)

    def track(
        self, tracker: Tracker, frames: Sequence[np.ndarray], labels: Sequence[np.ndarray | None]
    ) -> list[np.ndarray]:
        """Return the masks of the next frames of a tracker on the model's backbone."""
        with self._computing:
            return tracker.track(frames, labels)

    def close(self) -> None:
        """End the process that decodes images."""
        self._decoder.close()
