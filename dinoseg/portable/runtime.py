"""What computes for a model in one file: torch, or another runtime where torch is not installed."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from dinoseg.portable.facts import Facts


class Runtime(Protocol):
    """Pictures of one size to classes of the same size. An implementation may not need torch."""

    name: str  # torch | onnx

    def ids(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Return the class ids (B, H, W) uint8 of images (H, W, 3) uint8 RGB of one size."""
        ...

    def probabilities(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Return the class probabilities (B, K, H, W) float32 of images (H, W, 3) uint8 RGB of one size."""
        ...


class Opened(NamedTuple):
    """What computes for a model, what the model says of itself, and its file, if it is a model in one file."""

    runtime: Runtime
    facts: Facts
    file: Path | None = None
