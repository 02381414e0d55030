"""Inference on arrays and image files of any size: class IDs or probabilities at the input's size."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from dinoseg.core.objects import Objects
from dinoseg.core.shapes import Prediction
from dinoseg.core.task import ObjectTask, refuse_layers
from dinoseg.inference.memory import OutOfMemory, free_bytes, telling_shortage
from dinoseg.inference.objects import ObjectCollector
from dinoseg.inference.rows import MemoryRows
from dinoseg.inference.strategy import Autocast, InferenceStrategy, OnPass
from dinoseg.inference.windows import Whole
from dinoseg.models.model import SegmentationModel, Size
from dinoseg.utils.devices import to_device
from dinoseg.utils.errors import UserError
from dinoseg.utils.images import ImageTooLarge, lift_pixel_limit, read_image, read_size, write_png
from dinoseg.utils.wording import in_bytes

T = TypeVar("T")
_DECODING_BYTES = 24  # of memory per pixel: WebP takes 22, other formats up to 16 (docs/log/memory.md)


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

    @torch.inference_mode()
    def write_ids(self, source: str | Path, target: str | Path) -> None:
        """Write the class IDs of an image file of any size to a PNG file, which appears only when complete.

        The image is decoded as a whole. Windows, or `auto`, which uses windows for large images, need window
        height x image width x classes float32 numbers.

        Raises:
            UserError: the source cannot be read, or memory does not suffice.
            OSError: the target cannot be written.
        """
        refuse_layers(self.model.task, f"a mask of {source}, which is written by rows,", "Split or reduce the image.")
        rows = read_rows(source, self.device)
        top = 0
        with telling_shortage(rows):
            ids = np.empty(rows.size, np.uint8)
            for band in self.strategy.bands(self.model, rows, self.autocast):
                band_ids = band.class_ids()[0].cpu().numpy()
                ids[top : top + len(band_ids)] = band_ids
                top += len(band_ids)
        write_png(target, ids)

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


def is_large(path: str | Path) -> bool:
    """Return whether an image file has more pixels than `read_image` reads."""
    try:
        read_size(path)
    except ImageTooLarge:
        return True
    except UserError:  # raised again when the image is read
        return False
    return False


def read_rows(path: str | Path, device: torch.device) -> MemoryRows:
    """Read an image file of any size; its rows are copied to the device as they are requested.

    Raises:
        UserError: the file is missing, truncated or no image, or memory does not suffice.
    """
    with lift_pixel_limit():
        height, width = read_size(path)
        needed = _DECODING_BYTES * height * width
        free = free_bytes(torch.device("cpu"))
        if needed > free:
            raise UserError(
                f"{path} of {width} x {height} pixels (width x height) needs {in_bytes(needed)} of memory to be read, "
                f"and {in_bytes(free)} are free. Free some, or reduce or split the image."
            )
        pixels = torch.from_numpy(read_image(path).copy())
    return MemoryRows(pixels.permute(2, 0, 1)[None], device)
