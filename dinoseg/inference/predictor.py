"""Inference on arrays and image files of any size: class IDs or probabilities at the input's size."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from dinoseg.core.shapes import Prediction
from dinoseg.inference.memory import OutOfMemory, telling_shortage
from dinoseg.inference.png_rows import PngWriter
from dinoseg.inference.policy import Autocast, Policy, Seen
from dinoseg.inference.rows import MemoryRows, Rows
from dinoseg.inference.strips import open_rows
from dinoseg.inference.whole import Whole
from dinoseg.models.model import SegmentationModel, Size
from dinoseg.utils.atomic import atomic_file
from dinoseg.utils.transfer import to_device

T = TypeVar("T")


@dataclass(frozen=True)
class Predictor:
    """SegmentationModel in eval mode with its device, precision and inference strategy."""

    model: SegmentationModel
    device: torch.device
    autocast: Autocast
    policy: Policy = field(default_factory=Whole)

    @torch.inference_mode()
    def ids(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Return the class IDs (B, H, W) uint8 of images (H, W, 3) uint8 RGB of one size.

        Raises:
            OutOfMemory: the images need more memory than is available.
        """
        return (
            self.run_bands(self._stacked(images), lambda bands: torch.cat([band.class_ids() for band in bands], dim=1))
            .cpu()
            .numpy()
        )

    @torch.inference_mode()
    def probabilities(self, images: Sequence[np.ndarray]) -> Tensor:
        """Return the class probabilities (B, K, H, W) float32, on the device, of images (H, W, 3) of one size.

        Raises:
            OutOfMemory: the images need more memory than is available.
        """
        return self.run_bands(
            self._stacked(images),
            lambda bands: torch.cat([band.logits().float().softmax(dim=1) for band in bands], dim=2),
        )

    def strips(self, source: str | Path) -> Iterator[np.ndarray]:
        """Yield class IDs (r, W) uint8 in bands of rows, from the top down, without loading the whole image file.

        With a policy of windows, or `auto`, which uses windows for large images, memory is bounded by the image's
        width: window height x image width x classes float32 numbers. `open_rows` lists the supported files.

        Raises:
            UserError: the file cannot be read, or memory does not suffice.
        """
        return self._strips(open_rows(source, self.device))

    def write_strips(self, source: str | Path, target: str | Path) -> None:
        """Write the class IDs of `strips` to a PNG file, row by row; the file appears only when complete.

        Raises:
            UserError: the source cannot be read, or memory does not suffice.
            OSError: the target cannot be written.
        """
        rows = open_rows(source, self.device)
        with atomic_file(Path(target)) as part, PngWriter(part, rows.size) as file:
            for ids in self._strips(rows):
                file.write(ids)

    def run_bands(
        self,
        images: Tensor,
        take: Callable[[Iterator[Prediction]], T],
        *,
        size: Size | None = None,
        seen: Seen | None = None,
    ) -> T:
        """Return `take(bands)` for the predictions of bands of rows, each valid until the next is requested.

        If memory does not suffice and the policy has a fallback that uses less, `take` is called again.

        Args:
            images: (B, 3, H, W) on the device, of one size.
            take: function of the iterator of bands, from the top down.
            size: (H, W) to predict at; None: the images' own size.
            seen: callback for each pass of the model, see `Policy`.

        Raises:
            OutOfMemory: the images need more memory than is available.
        """
        rows = MemoryRows(images)
        while True:
            try:
                with telling_shortage(rows):
                    return take(self.policy.bands(self.model, rows, self.autocast, size=size, seen=seen))
            except OutOfMemory:
                if not self.policy.spare(self.model, rows, size=size):
                    raise

    @torch.inference_mode()
    def _strips(self, rows: Rows) -> Iterator[np.ndarray]:
        with telling_shortage(rows):
            for band in self.policy.bands(self.model, rows, self.autocast):
                yield band.class_ids()[0].cpu().numpy()

    def _stacked(self, images: Sequence[np.ndarray]) -> Tensor:
        return to_device(torch.from_numpy(np.stack(images)), self.device).permute(0, 3, 1, 2).contiguous()
