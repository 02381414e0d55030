"""How a trained model is asked for the classes of an image: the contract, and whole images."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Protocol

from torch import Tensor, nn

from dinoseg.shapes import Prediction

Autocast = Callable[[], AbstractContextManager]
Size = tuple[int, int]  # (H, W)


class Policy(Protocol):
    """Which parts of an image a model sees at a time, and how their predictions become one."""

    def bands(
        self, model: nn.Module, images: Tensor, autocast: Autocast, *, size: Size | None = None
    ) -> Iterator[Prediction]:
        """Yield predictions of bands of rows, from the top down, that together cover images of one size.

        Args:
            model: images (B, 3, H, W) uint8 to a `Prediction`.
            images: (B, 3, H, W) uint8 on the model's device.
            autocast: the precision's context.
            size: (H, W) to predict at; None: the images' own.
        """
        ...


class Whole(Policy):
    """The whole image at once, padded to the backbone's patches."""

    def bands(
        self, model: nn.Module, images: Tensor, autocast: Autocast, *, size: Size | None = None
    ) -> Iterator[Prediction]:
        """Yield one band, the model's own prediction."""
        with autocast():
            prediction = model(images)
        yield replace(prediction, size=size or prediction.size)
