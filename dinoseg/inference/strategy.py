"""Protocol of inference strategies, which the config group `inference` selects from."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

from torch import Tensor

from dinoseg.core.shapes import Prediction
from dinoseg.inference.rows import Rows
from dinoseg.models.model import SegmentationModel, Size

Autocast = Callable[[], AbstractContextManager]


class Place(NamedTuple):
    """Position of a crop: index of its image in the batch, and row and column of its first pixel."""

    image: int
    top: int
    left: int


# called after each pass with (prediction, its input (n, 3, h, w), places of the inputs, (H, W) of the images)
OnPass = Callable[[Prediction, Tensor, Sequence[Place], Size], None]


class InferenceStrategy(Protocol):
    """Inference strategy: splits images into parts for the model and merges the predictions."""

    resizes: bool = False  # whether images of all sizes are resized to one size before the model sees them

    def bands(
        self,
        model: SegmentationModel,
        rows: Rows,
        autocast: Autocast,
        *,
        size: Size | None = None,
        on_pass: OnPass | None = None,
    ) -> Iterator[Prediction]:
        """Yield predictions of bands of rows, from the top down, that together cover images of one size.

        A band may be overwritten when the next one is requested.

        Args:
            model: segmenter in eval mode.
            rows: the images, on the model's device.
            autocast: context manager factory of the precision.
            size: (H, W) to predict at; None: the images' own size.
            on_pass: callback for unmirrored passes that together cover each pixel of the images.
        """
        ...

    @property
    def base(self) -> "InferenceStrategy":
        """The strategy without the post-processing of whole predictions, such as the removal of small regions."""
        return self

    def around(self, base: "InferenceStrategy") -> "InferenceStrategy":
        """Return another strategy with the post-processing of this one."""
        return base

    @property
    def no_objects_reason(self) -> str | None:
        """Why it predicts no single objects, with the remedy, for messages; None: it predicts them."""
        return f"inference: {type(self).__name__} predicts the classes of pixels, and no objects. Set inference=whole."

    def is_single_pass(self, model: SegmentationModel, size: Size, autocast: Autocast) -> bool:
        """Return whether the prediction of an image of `size` is a single pass over the whole image."""
        return False

    def equals_single_pass(self, model: SegmentationModel, size: Size, autocast: Autocast) -> bool:
        """Return whether an image of `size` gets the classes of one pass over the whole image, however computed."""
        return self.is_single_pass(model, size, autocast)

    def reduce_memory(self, model: SegmentationModel, rows: Rows, *, size: Size | None = None) -> bool:
        """Handle an out-of-memory error of `bands` for such images; return whether a retry would use less memory."""
        return False
