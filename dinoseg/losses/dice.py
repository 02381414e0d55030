"""Dice loss: the soft overlap of prediction and labels, class by class."""

from torch import Tensor

from dinoseg.core.contracts import Loss
from dinoseg.core.shapes import Batch, Prediction
from dinoseg.losses.border import Border
from dinoseg.losses.full_resolution import pixel_sums
from dinoseg.losses.fused import Form
from dinoseg.losses.labelled import image_count, labelled_images
from dinoseg.losses.tversky import overlap_sums, tversky_loss
from dinoseg.utils.ranges import Count, NotNegative


class Dice(Loss):
    """Soft dice loss (Milletari et al., arXiv 1606.04797, without squares in the denominator, for K classes).

    The weighted mean of 1 - 2 sum(p_k g_k) / (sum p_k + sum g_k) over the classes k that occur in the labels, sums over
    all labelled pixels of the batch, p the softmax and g the labels. No smoothing term: a class that occurs
    has a denominator of at least one pixel.

    Args:
        class_weights: one weight (K,) per class, in the mean over the classes that occur.
        ignore_index: mask value that counts for nothing.
        border_weight: what a pixel near a border between classes counts in the sums, beside the 1 of others.
        border_width: pixels to each side that are near one.
    """

    weight: Tensor
    sums_over_batch = True

    def __init__(
        self,
        class_weights: Tensor,
        ignore_index: int = 255,
        border_weight: NotNegative = 1.0,
        border_width: Count = 3,
    ) -> None:
        super().__init__()
        self.register_buffer("weight", class_weights, persistent=False)
        self.ignore_index = ignore_index
        self.divisor = ("images", ignore_index)
        self.border = Border(border_weight, border_width)

    def forward(self, prediction: Prediction, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, and `weight`: the number of images with a labelled pixel."""
        weights = self.border.weights(batch.mask, self.ignore_index)
        sums = pixel_sums(prediction, batch, self.ignore_index, overlap_sums, weights=weights, form=Form())
        value = tversky_loss(sums, self.weight, alpha=0.5, beta=0.5)
        return value, {"weight": labelled_images(batch.mask, self.ignore_index).to(value.dtype)}

    def divisors(self, batch: Batch) -> Tensor:
        """Return the number of images with a labelled pixel (1,)."""
        return image_count(batch, self.ignore_index, self.weight)
