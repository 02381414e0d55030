"""A trained model asked for pictures: arrays of any size in, class ids or probabilities of that size out."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dinoseg.inference.policy import Autocast, Policy, Seen
from dinoseg.inference.rows import HeldRows
from dinoseg.inference.strips import PngRows, open_rows
from dinoseg.inference.whole import Whole
from dinoseg.model import Segmenter, Size
from dinoseg.shapes import Prediction
from dinoseg.storage.atomic import whole_file


@dataclass(frozen=True)
class Predictor:
    """A segmenter in eval mode on its device, the precision that it computes in, and how it is asked."""

    model: Segmenter
    device: torch.device
    autocast: Autocast
    policy: Policy = field(default_factory=Whole)

    @torch.inference_mode()
    def ids(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Return the class ids (B, H, W) uint8 of images (H, W, 3) uint8 RGB of one size."""
        return self.class_ids(self._stacked(images)).cpu().numpy()

    @torch.inference_mode()
    def probabilities(self, images: Sequence[np.ndarray]) -> Tensor:
        """Return the class probabilities (B, K, H, W) float32, on the device, of images (H, W, 3) of one size."""
        bands = self.bands(self._stacked(images))
        return torch.cat([band.logits().float().softmax(dim=1) for band in bands], dim=2)

    @torch.inference_mode()
    def strips(self, source: str | Path) -> Iterator[np.ndarray]:
        """Yield the class ids (r, W) uint8 of bands of rows, from the top down, of an image file that is never held.

        With a policy of windows (or `auto`, which takes them for what is large) memory is bounded by the image's width:
        windows' height x width x classes float32 numbers. Which files can be read so: see `open_rows`.

        Raises:
            UserError: the file cannot be read.
        """
        for band in self.policy.bands(self.model, open_rows(source, self.device), self.autocast):
            yield band.scores().max(dim=1).indices.to(torch.uint8)[0].cpu().numpy()

    def write_strips(self, source: str | Path, target: str | Path) -> None:
        """Write the class ids of `strips` as a PNG file, rows as they are done; it appears whole or not at all.

        Raises:
            UserError: the source cannot be read.
            OSError: the target cannot be written.
        """
        size = open_rows(source, torch.device("cpu")).size
        with whole_file(Path(target)) as part, PngRows(part, size) as file:
            for ids in self.strips(source):
                file.write(ids)

    def class_ids(self, images: Tensor, size: Size | None = None, seen: Seen | None = None) -> Tensor:
        """Return the class ids (B, H, W) uint8 of images (B, 3, H, W) uint8 on the device.

        Args:
            images: of one size.
            size: (H, W) of the ids; None: the images' own.
            seen: told of each pass of the model, see `Policy`.
        """
        # the indices of max are those of argmax, which takes 6 times as long on a CPU
        ids = [band.scores().max(dim=1).indices.to(torch.uint8) for band in self.bands(images, size, seen)]
        return torch.cat(ids, dim=1)

    def bands(self, images: Tensor, size: Size | None = None, seen: Seen | None = None) -> Iterator[Prediction]:
        """Yield predictions of bands of rows, from the top down, each gone when the next is asked for."""
        return self.policy.bands(self.model, HeldRows(images), self.autocast, size=size, seen=seen)

    def _stacked(self, images: Sequence[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.stack(images)).to(self.device).permute(0, 3, 1, 2).contiguous()
