"""Cross-entropy over hard pixels by their probability (OHEM), as in UniMatch V2 on Cityscapes."""

import torch
from torch import Tensor

from dinoseg.core.contracts import safe_divide
from dinoseg.core.shapes import Batch, Prediction
from dinoseg.losses.cross_entropy import CrossEntropy
from dinoseg.losses.full_resolution import pixel_sums, pixel_values
from dinoseg.utils.ranges import Count, Share, check_annotations


class OhemCrossEntropy(CrossEntropy):
    """Mean cross-entropy over the pixels whose true class is improbable (Shrivastava et al., arXiv 1604.03540).

    A pixel counts if this probability is at most `threshold`, or among the `min_kept` smallest of the batch. If fewer
    pixels than `min_kept` are labelled, all of these count (LiheYoung/UniMatch-V2, util/ohem.py).

    Args:
        class_weights: one weight (K,) per class, see `PixelMean`.
        ignore_index: mask value of unlabelled pixels.
        threshold: largest probability of a hard pixel.
        min_kept: minimum number of pixels of a batch on one device.
    """

    sums_over_batch = True

    @check_annotations
    def __init__(
        self, class_weights: Tensor, ignore_index: int = 255, threshold: Share = 0.7, min_kept: Count = 200_000
    ) -> None:
        super().__init__(class_weights, ignore_index)
        self.threshold = threshold
        self.min_kept = min_kept
        self.divisor = None

    def forward(self, prediction: Prediction, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, and `weight`: the summed weights of the pixels that count."""
        true = pixel_values(prediction, batch, self.ignore_index, _probability_of_label)
        weights = self.select_pixels(true, batch.mask != self.ignore_index).to(true.dtype)
        total, weight = pixel_sums(prediction, batch, self.ignore_index, self._sums, weights=weights, first_alone=True)
        return safe_divide(total, weight.detach()), {"weight": weight.detach()}

    @torch.no_grad()
    def select_pixels(self, true: Tensor, labelled: Tensor) -> Tensor:
        """Return the pixels (B, H, W) bool that count; NaN counts too.

        Args:
            true: probability of each pixel's label.
            labelled: pixels with a label, bool.
        """
        if labelled.sum() < self.min_kept:
            return labelled
        smallest = true.where(labelled, 1.0).flatten().kthvalue(min(self.min_kept, true.numel())).values
        return labelled & ~(true > smallest.clamp(min=self.threshold))


def _probability_of_label(scores: Tensor, target: Tensor, _: Tensor) -> Tensor:
    return scores.softmax(0).gather(0, target.clamp(min=0)[None])[0]
