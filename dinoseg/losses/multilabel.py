"""Losses of multi-label masks: binary cross-entropy and Dice of each class, over its labelled pixels."""

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from dinoseg.core.contracts import Loss, safe_divide
from dinoseg.core.shapes import Batch, Prediction
from dinoseg.losses.labelled import ImageLoss, labelled_images
from dinoseg.losses.overlap import tversky_loss
from dinoseg.utils.devices import to_device


class BinaryCrossEntropy(Loss):
    """Mean of the binary cross-entropy over the labelled pixels of all classes, weighted by class.

    Args:
        class_weights: one weight (K,) per class.
        ignore_index: mask value of unlabelled pixels of a class.
    """

    weight: Tensor
    needs = frozenset({"layers"})

    def __init__(self, class_weights: Tensor, ignore_index: int = 255) -> None:
        super().__init__()
        self.register_buffer("weight", class_weights, persistent=False)
        self.ignore_index = ignore_index
        weights = () if class_weights.is_meta else tuple(class_weights.tolist())  # meta tensors have no values
        self.divisor = ("labelled layers", ignore_index, weights)

    def forward(self, prediction: Prediction, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, and `weight`: the summed weights of the labelled pixels of all classes."""
        logits, target, labelled = _read_layers(prediction, batch, self.ignore_index)
        weights = labelled * self.weight.to(logits.dtype)[:, None, None]
        total = binary_cross_entropy_with_logits(logits, target, weights, reduction="sum")
        return safe_divide(total, weights.sum()), {"weight": weights.sum()}

    def divisors(self, batch: Batch) -> Tensor:
        """Return the summed weights (1,) of the labelled pixels of all classes."""
        mask = to_device(batch.mask, self.weight.device)
        labelled = (mask != self.ignore_index).sum(dim=(0, 2, 3))
        return (labelled * self.weight).sum()[None]


class BinaryDice(ImageLoss):
    """Soft Dice loss of each class by itself (Milletari et al., arXiv 1606.04797, without squares).

    It is the weighted mean of 1 - 2 sum(p g) / (sum p + sum g) over the classes that occur in the labels. Sums are over
    the labelled pixels of the batch, p is the sigmoid and g the labels.
    """

    needs = frozenset({"layers"})

    def forward(self, prediction: Prediction, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, and `weight`: the number of images with a labelled pixel."""
        logits, target, labelled = _read_layers(prediction, batch, self.ignore_index)
        shares = logits.sigmoid() * labelled
        sums = torch.cat([part.sum(dim=(0, 2, 3)) for part in (shares * target, shares, target)])
        # alpha = beta = 1/2 makes Tversky's index the dice
        value = tversky_loss(sums, self.weight, 0.5, 0.5)
        return value, {"weight": labelled_images(batch.mask, self.ignore_index).to(value.dtype)}


def _read_layers(prediction: Prediction, batch: Batch, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits, targets and labelled pixels, each (B, K, H, W), in float32 or better."""
    # without tiles: data of layers have few classes
    logits = prediction.logits((batch.mask.shape[-2], batch.mask.shape[-1]))
    labelled = (batch.mask != ignore_index).to(logits.dtype)
    return logits, (batch.mask == 1).to(logits.dtype), labelled
