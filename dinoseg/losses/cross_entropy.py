"""Cross-entropy on every labelled pixel, at the labels' own resolution."""

import torch.nn.functional as F
from torch import Tensor

from dinoseg.contracts import Loss
from dinoseg.errors import UserError
from dinoseg.losses.labelled import labelled_pixels, pixel_weights, ratio
from dinoseg.ranges import LowShare
from dinoseg.shapes import Batch, Prediction


class CrossEntropy(Loss):
    """Cross-entropy over pixels, the class scores brought to the masks' size first.

    Args:
        class_weights: one weight (K,) per class; the mean is over the summed weights, as in
            `torch.nn.functional.cross_entropy`.
        ignore_index: mask value that counts for nothing.
        label_smoothing: share of the target spread evenly over the classes, in [0, 1).
    """

    weight: Tensor

    def __init__(self, class_weights: Tensor, ignore_index: int = 255, label_smoothing: LowShare = 0.0) -> None:
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise UserError(f"loss.criterion.label_smoothing={label_smoothing}: give a number from 0 up to below 1.")
        self.register_buffer("weight", class_weights, persistent=False)
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing

    def forward(self, prediction: Prediction, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, and `weight`: the summed weights that it is a mean over.

        A batch without a labelled pixel gives 0 and a weight of 0.
        """
        logits, target = labelled_pixels(prediction, batch, self.ignore_index)
        class_weights = self.weight.to(logits.dtype)
        total = F.cross_entropy(
            logits, target, class_weights, reduction="sum", label_smoothing=self.label_smoothing
        )  # skips what is UNLABELLED
        weight = pixel_weights(target, class_weights).sum()
        return ratio(total, weight), {"weight": weight}
