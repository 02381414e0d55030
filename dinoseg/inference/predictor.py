"""Inference on images of any size: class IDs or probabilities at the input's size."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from dinoseg.core.objects import Objects
from dinoseg.core.shapes import Prediction
from dinoseg.core.task import ObjectTask
from dinoseg.inference.memory import OutOfMemory, telling_shortage
from dinoseg.inference.objects import ObjectCollector
from dinoseg.inference.rows import MemoryRows
from dinoseg.inference.strategy import Autocast, InferenceStrategy, OnPass
from dinoseg.inference.windows import Whole
from dinoseg.models.model import SegmentationModel, Size
from dinoseg.utils.devices import to_device

T = TypeVar("T")


class PixelsAndObjects(NamedTuple):
    """Prediction of an image.

    Attributes:
        ids: (H, W) uint8; of layers, (K, H, W).
        probabilities: (K, H, W) float32, on the device; None if they were not requested.
        objects: None if the task has none.
    """

    ids: np.ndarray
    probabilities: Tensor | None
    objects: Objects | None


@dataclass(frozen=True)
class Predictor:
    """SegmentationModel in eval mode with its device, precision and inference strategy."""

    model: SegmentationModel
    device: torch.device
    autocast: Autocast
    strategy: InferenceStrategy = field(default_factory=Whole)

    @torch.inference_mode()
    def ids(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Return the class IDs (B, H, W) uint8 of images (H, W, 3) uint8 RGB of one size; of layers, (B, K, H, W).

        Raises:
            OutOfMemory: the images need more memory than is available.
        """
        stack = self._stack_images(images)
        ids = self.run_bands(stack, lambda bands: torch.cat([band.class_ids() for band in bands], dim=-2))
        return ids.cpu().numpy()

    @torch.inference_mode()
    def probabilities(self, images: Sequence[np.ndarray]) -> Tensor:
        """Return the class probabilities (B, K, H, W) float32, on the device, of images (H, W, 3) of one size.

        Raises:
            OutOfMemory: the images need more memory than is available.
        """
        return self.run_bands(
            self._stack_images(images),
            lambda bands: torch.cat([band.probabilities() for band in bands], dim=2),
        )

    @torch.inference_mode()
    def predict(self, images: Sequence[np.ndarray], *, probabilities: bool = False) -> list[PixelsAndObjects]:
        """Return the class IDs of each image (H, W, 3) of one size, from the same passes as its objects.

        Raises:
            OutOfMemory: the images need more memory than is available.
        """
        stack, task = self._stack_images(images), self.model.task
        size = (stack.shape[-2], stack.shape[-1])
        collector = ObjectCollector(task, len(images), size) if isinstance(task, ObjectTask) else None

        def take(bands: Iterator[Prediction]) -> tuple[Tensor, Tensor | None]:
            if collector is not None:
                collector.clear()  # of an attempt that ran out of memory
            if not probabilities:
                return torch.cat([band.class_ids() for band in bands], dim=-2), None
            shares = torch.cat([band.probabilities() for band in bands], dim=2)
            return task.decide(shares), shares

        ids, shares = self.run_bands(stack, take, on_pass=collector)
        columns = (ids.cpu().numpy(), repeat(None) if shares is None else shares)
        objects = repeat(None) if collector is None else collector.objects()
        return list(map(PixelsAndObjects, *columns, objects))

    def run_bands(
        self,
        images: Tensor,
        take: Callable[[Iterator[Prediction]], T],
        *,
        size: Size | None = None,
        on_pass: OnPass | None = None,
    ) -> T:
        """Return `take(bands)` for the predictions of bands of rows, each valid until the next is requested.

        If memory does not suffice and the strategy has a fallback that uses less, `take` is called again.

        Args:
            images: (B, 3, H, W) on the device, of one size.
            take: function of the iterator of bands, from the top down.
            size: (H, W) to predict at; None: the images' own size.
            on_pass: callback for each pass of the model, see `InferenceStrategy`.

        Raises:
            OutOfMemory: the images need more memory than is available.
        """
        rows = MemoryRows(images)
        while True:
            try:
                with telling_shortage(rows):
                    return take(self.strategy.bands(self.model, rows, self.autocast, size=size, on_pass=on_pass))
            except OutOfMemory:
                if not self.strategy.reduce_memory(self.model, rows, size=size):
                    raise

    def _stack_images(self, images: Sequence[np.ndarray]) -> Tensor:
        return to_device(torch.from_numpy(np.stack(images)), self.device).permute(0, 3, 1, 2).contiguous()
