"""A trained model asked for pictures: arrays of any size in, class ids or probabilities of that size out."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from dinoseg.shapes import Prediction


@dataclass(frozen=True)
class Predictor:
    """A segmenter in eval mode on its device, and the precision that it computes in."""

    model: nn.Module  # images (B, 3, H, W) uint8 to a `Prediction`
    device: torch.device
    autocast: Callable[[], AbstractContextManager]

    @torch.inference_mode()
    def ids(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Return the class ids (B, H, W) uint8 of images (H, W, 3) uint8 RGB of one size."""
        # the indices of max are those of argmax, which takes 6 times as long on a CPU
        return self._predict(images).scores().max(dim=1).indices.to(torch.uint8).cpu().numpy()

    @torch.inference_mode()
    def probabilities(self, images: Sequence[np.ndarray]) -> Tensor:
        """Return the class probabilities (B, K, H, W) float32, on the device, of images (H, W, 3) of one size."""
        return self._predict(images).logits().float().softmax(dim=1)

    def _predict(self, images: Sequence[np.ndarray]) -> Prediction:
        batch = torch.from_numpy(np.stack(images)).to(self.device)
        with self.autocast():
            return self.model(batch.permute(0, 3, 1, 2).contiguous())
