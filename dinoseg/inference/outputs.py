"""What each predicted image is handed to: writers of files beside those that mode=predict always leaves."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class ImagePrediction:
    """One image and what a model sees in it.

    Args:
        name: the image's place below the input, without suffix, as its mask is called: `a/x`.
        path: the image file.
        image: (H, W, 3) uint8 RGB, upright.
        ids: (H, W) uint8, classes 0..K-1.
        probabilities: (K, H, W) float32 on the model's device; None where no writer asks for them.
    """

    name: str
    path: Path
    image: np.ndarray
    ids: np.ndarray
    probabilities: Tensor | None = None


class ImageWriter(Protocol):
    """Writes an output of every image; called in one thread, image after image."""

    needs_probabilities: bool  # else `probabilities` may be None

    def write(self, prediction: ImagePrediction) -> None:
        """Write what belongs to one image, whole or not at all."""
        ...

    def finish(self) -> None:
        """Write what belongs to all images together, also those that an earlier, stopped run has written."""
        ...
