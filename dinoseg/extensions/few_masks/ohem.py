"""Cross-entropy over hard pixels by their probability (OHEM), as in UniMatch V2 on Cityscapes."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dinoseg.losses.cross_entropy import CrossEntropy
from dinoseg.losses.pixel_mean import Hardest
from dinoseg.utils.ranges import Count, Share, check_annotations


@dataclass(frozen=True, kw_only=True)
class Improbable(Hardest):
    """Selection of pixels whose true class is improbable.

    Args:
        share: 0: the number of pixels depends on the probabilities.
        threshold: largest probability of a selected pixel.
        min_kept: minimum number of pixels; if fewer are labelled, all of these are selected.
    """

    share: float = 0.0
    threshold: float
    min_kept: int

    @torch.no_grad()
    def select_pixels(self, costs: Tensor, labelled: Tensor) -> Tensor:
        """Return the selected pixels (B, H, W) bool by their losses; NaN losses are selected too."""
        true = (-costs).exp()
        smallest = true.where(labelled, 1.0).flatten().kthvalue(min(self.min_kept, true.numel())).values
        limit = smallest.clamp(min=self.threshold).where(labelled.sum() >= self.min_kept, 1.0)
        return labelled & ~(true > limit)


class OhemCrossEntropy(CrossEntropy):
    """Mean cross-entropy over the pixels whose true class is improbable (Shrivastava et al., arXiv 1604.03540).

    A pixel counts if the probability p of its label is at most `threshold`, or among the `min_kept` smallest of the
    batch (LiheYoung/UniMatch-V2, util/ohem.py). With class weights w, p^w stands for p.

    Args:
        class_weights: one weight (K,) per class, see `PixelMean`.
        ignore_index: mask value of unlabelled pixels.
        threshold: largest probability of a hard pixel.
        min_kept: minimum number of pixels of a batch on one device; if fewer are labelled, all of these count.
    """

    sums_over_batch = True

    @check_annotations
    def __init__(
        self, class_weights: Tensor, ignore_index: int = 255, threshold: Share = 0.7, min_kept: Count = 200_000
    ) -> None:
        super().__init__(class_weights, ignore_index)
        self.hardest = Improbable(threshold=threshold, min_kept=min_kept)
        self.divisor = None  # known after the forward pass only
