"""Prediction of one image, and the protocol of the writers that mode=predict passes it to."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np
from torch import Tensor

from dinoseg.data.classes.labels import Labels


@dataclass(frozen=True)
class ImagePrediction:
    """Image and the model's prediction for it.

    Args:
        name: the image's path relative to the input, without suffix, which is also the mask's name: `a/x`.
        path: the image file.
        image: (H, W, 3) uint8 RGB, upright; or (H, W, C), uint8 or uint16, of other channels.
        ids: (H, W) uint8, classes 0..K-1; or layers (K, H, W) of 0 and 1.
        probabilities: (K, H, W) float32 on the model's device; None if no writer needs them.
    """

    name: str
    path: Path
    image: np.ndarray
    ids: np.ndarray
    probabilities: Tensor | None = None


class ImageWriter(Protocol):
    """Protocol of writers of one output per image, called sequentially from one thread."""

    needs_probabilities: bool  # if False, `probabilities` may be None

    def write(self, prediction: ImagePrediction) -> None:
        """Write the files of one image atomically."""
        ...

    def finish(self) -> None:
        """Write the files that cover all images, including those of an earlier run that was stopped."""
        ...


class FurtherOutputs(ABC):
    """Base class of what brings outputs of its own to mode=predict, such as the files of annotation tools."""

    names: ClassVar[Sequence[str]]  # of the outputs

    @abstractmethod
    def make_writer(self, name: str, folder: Path, labels: Labels, background: int | None) -> ImageWriter:
        """Return the writer of one of its outputs.

        Args:
            name: of the output.
            folder: receives its files.
            labels: the classes.
            background: ID of the class that is not an object; None: without one.
        """
