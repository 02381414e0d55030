"""A trained model asked for pictures: arrays of any size in, class ids or probabilities of that size out."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from dinoseg.inference.policy import Autocast, Policy, Seen
from dinoseg.inference.rows import HeldRows
from dinoseg.inference.whole import Whole
from dinoseg.model import Segmenter, Size
from dinoseg.shapes import Prediction


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
