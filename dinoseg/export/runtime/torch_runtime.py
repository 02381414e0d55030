"""Inference with torch: a predictor with numpy results, and isolation from the surrounding program."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from dinoseg.config.resolvers import lent_resolvers
from dinoseg.inference.predictor import Predictor


class TorchRuntime:
    """The `Runtime` of torch: a predictor with numpy results; the model is in eval mode while it predicts."""

    name = "torch"

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor

    @property
    def has_layers(self) -> bool:
        """Whether masks have a layer for each class."""
        return self.predictor.model.task.has_layers

    def ids(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Return the class ids (B, H, W) uint8 of images (H, W, 3) uint8 RGB of one size; of layers, (B, K, H, W)."""
        with _eval_mode(self.predictor.model):
            return self.predictor.ids(images)

    def probabilities(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Return the class probabilities (B, K, H, W) float32 of images (H, W, 3) uint8 RGB of one size."""
        with _eval_mode(self.predictor.model):
            return self.predictor.probabilities(images).cpu().numpy()


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Set a model to eval mode within the block, and restore the mode of each of its modules after it."""
    training = [part for part in model.modules() if part.training] if model.training else []
    model.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


@contextmanager
def preserve_global_state() -> Iterator[None]:
    """Restore OmegaConf's resolvers and torch's random state after the block, which may set them."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with lent_resolvers(), torch.random.fork_rng(devices):
        yield
