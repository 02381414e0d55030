"""Torch as a model's runtime, and a trained model of this program as one to use."""

from collections.abc import Sequence

import numpy as np

from dinoseg.inference.predictor import Predictor
from dinoseg.inference.trained_sizes import TrainedSizes, keep_scale
from dinoseg.portable.facts import Facts
from dinoseg.portable.model import Model
from dinoseg.runs.trained import Trained


class TorchRuntime:
    """A predictor whose results are numpy's."""

    name = "torch"

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor

    def ids(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Return the class ids (B, H, W) uint8 of images (H, W, 3) uint8 RGB of one size."""
        return self.predictor.ids(images)

    def probabilities(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Return the class probabilities (B, K, H, W) float32 of images (H, W, 3) uint8 RGB of one size."""
        return self.predictor.probabilities(images).cpu().numpy()


def model_of(trained: Trained, sizes: TrainedSizes | None) -> Model:
    """Return a trained model as one that takes pictures of any kind.

    Args:
        trained: in eval mode.
        sizes: those that pictures are brought to, as `runs.trained.sizes_to_keep` gives them.
    """
    keep_scale(trained.model, sizes)
    return Model(TorchRuntime(trained.predictor), Facts.of(trained.info, "the checkpoint"))
