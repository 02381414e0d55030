"""Shared functions of the losses: logits and labels at mask size, factors of terms and numbers of images."""

from collections.abc import Iterable, Mapping

from torch import Tensor

from dinoseg.core.contracts import Loss
from dinoseg.core.shapes import Batch, Prediction
from dinoseg.core.targets import label_ids
from dinoseg.utils.devices import to_device
from dinoseg.utils.errors import UserError


def labelled_pixels(prediction: Prediction, batch: Batch, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Return logits (B, K, H, W) at mask size, in float32 or better, and the `label_ids` (B, H, W)."""
    height, width = batch.mask.shape[-2:]
    return prediction.logits((height, width)), label_ids(batch.mask, ignore_index)


def check_classes(class_weights: Tensor) -> None:
    """Refuse a softmax over a single class, whose probability is 1 whatever its score.

    Raises:
        UserError: there is one class.
    """
    if len(class_weights) == 1:
        raise UserError(
            "With 1 class every probability is 1 and the loss 0, without a gradient. Give scores of at least two "
            "classes: for one kind of object, the background and the object."
        )


def checked_factors(factors: Mapping[str, float], terms: Iterable[str]) -> dict[str, float]:
    """Return one factor per term, in the order of the terms.

    Raises:
        UserError: a term without a factor, or a factor without a term.
    """
    names = list(terms)
    if factors.keys() != {*names}:
        raise UserError(f"factors={dict(factors)}: give one for each of the terms {', '.join(names)}, and no other.")
    return {name: float(factors[name]) for name in names}


def labelled_images(mask: Tensor, ignore_index: int) -> Tensor:
    """Return the number of images with a labelled pixel."""
    return (mask != ignore_index).flatten(1).any(dim=1).sum()


class ImageLoss(Loss):
    """Base class of losses whose divisor is the number of images with a labelled pixel.

    Args:
        class_weights: one weight (K,) per class.
        ignore_index: mask value of unlabelled pixels.
    """

    weight: Tensor
    sums_over_batch = True

    def __init__(self, class_weights: Tensor, ignore_index: int = 255) -> None:
        super().__init__()
        self.register_buffer("weight", class_weights, persistent=False)
        self.ignore_index = ignore_index
        self.divisor = ("images", ignore_index)

    def divisors(self, batch: Batch) -> Tensor:
        """Return the number of images with a labelled pixel (1,)."""
        mask = to_device(batch.mask, self.weight.device)
        return labelled_images(mask, self.ignore_index).to(self.weight.dtype)[None]
