"""How a trained model is asked for the classes of an image: the contract of what `cfg/inference` chooses from."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

from torch import Tensor

from dinoseg.core.shapes import Prediction
from dinoseg.inference.rows import Rows
from dinoseg.models.model import Segmenter, Size

Autocast = Callable[[], AbstractContextManager]


class Place(NamedTuple):
    """Which image of a batch a part is of, and where its first pixel lies."""

    image: int
    top: int
    left: int


# told of a pass of the model: its prediction, what it saw (n, 3, h, w), where that lies, and in images of which (H, W)
Seen = Callable[[Prediction, Tensor, Sequence[Place], Size], None]


class Policy(Protocol):
    """Which parts of an image a model sees at a time, and how their predictions become one."""

    def bands(
        self, model: Segmenter, rows: Rows, autocast: Autocast, *, size: Size | None = None, seen: Seen | None = None
    ) -> Iterator[Prediction]:
        """Yield predictions of bands of rows, from the top down, that together cover images of one size.

        A band may be overwritten when the next one is asked for.

        Args:
            model: in eval mode.
            rows: the images, on the model's device.
            autocast: the precision's context.
            size: (H, W) to predict at; None: the images' own.
            seen: told of passes that together see each pixel of the images, none of it mirrored.
        """
        ...

    def sees_whole(self, model: Segmenter, size: Size, autocast: Autocast) -> bool:
        """Return whether one pass sees all of an image of `size`, and nothing else does: then this is its answer."""
        return False

    def spare(self, model: Segmenter, rows: Rows, *, size: Size | None = None) -> bool:
        """Hear that memory did not suffice for `bands` of such images; return whether it takes less from now on."""
        return False
