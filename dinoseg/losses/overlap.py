"""Overlap losses: Tversky, with separate weights for false positives and false negatives, and dice."""

import torch
from torch import Tensor

from dinoseg.core.contracts import safe_divide
from dinoseg.core.shapes import Batch, Prediction
from dinoseg.losses.full_resolution import Vjp, pixel_sums
from dinoseg.losses.fused import KernelSpec
from dinoseg.losses.labelled import ImageLoss, check_classes, labelled_images
from dinoseg.utils.ranges import NotNegative, Positive, check_annotations


def overlap_sums(scores: Tensor, target: Tensor, counted: Tensor) -> tuple[Tensor, Vjp]:
    """Return the overlap sums (3 K,) of a tile and the gradient function: a `full_resolution.Term`.

    For each class they are the soft hits sum p_k g_k, the predicted area sum p_k, and the labelled area sum g_k. They
    run over labelled pixels; p is the softmax and g the labels. `counted` (N,) is 0 or 1.
    """
    index = target.clamp(min=0)
    shares = scores.sub_(scores.amax(0)).exp_()
    shares.mul_(counted / shares.sum(0))
    label_share = shares.gather(0, index[None])[0]  # (N,)
    # one running sum per class would round each share up to 1 beyond 65,536 pixels: `sum` adds in pairs
    hits = torch.zeros_like(shares).scatter_(0, index[None], label_share[None]).sum(1)
    wanted = scores.new_zeros(len(scores)).index_add_(0, index, counted)  # whole numbers are exact

    # softmax: p_k (g_k - sum_j g_j p_j) for the slopes g of the shares, where hits add to the label's slope alone
    def pull(upstream: Tensor) -> Tensor:
        of_hits, of_claims = upstream.view(3, -1)[:2]
        hit = of_hits[index] * label_share
        shares.mul_(of_claims[:, None] - (of_claims @ shares + hit))
        return shares.scatter_add_(0, index[None], hit[None])

    return torch.cat([hits, shares.sum(1), wanted]), pull


def tversky_loss(sums: Tensor, class_weights: Tensor, alpha: float, beta: float) -> Tensor:
    """Return the weighted mean of 1 - T_k over the classes k that occur in the labels of the batch.

    T_k = TP / (TP + alpha FP + beta FN), after Salehi et al. (arXiv 1706.05721), for K classes. The soft counts are
    TP = sum p_k g_k, FP = sum p_k (1 - g_k) and FN = sum (1 - p_k) g_k. They run over all labelled pixels of the
    batch; p is the softmax and g the labels.

    Args:
        sums: (3 K,) of `overlap_sums`.
        class_weights: (K,).
        alpha: weight of false positives.
        beta: weight of false negatives.
    """
    hits, claimed, wanted = sums.view(3, -1)
    present = wanted > 0
    denominator = hits + alpha * (claimed - hits) + beta * (wanted - hits)
    # an absent class has no hits, so 1 - T_k = 1 with a weight of 0; its denominator may be 0
    index = hits / torch.where(present, denominator, 1)
    weights = torch.where(present, class_weights.to(sums.dtype), 0)
    return safe_divide((weights * (1 - index)).sum(), weights.sum())


class Tversky(ImageLoss):
    """The `tversky_loss` of a batch.

    Args:
        class_weights: one weight (K,) per class, in the mean over the classes that occur.
        ignore_index: mask value of unlabelled pixels.
        alpha: weight of false positives, at least 0.
        beta: weight of false negatives, above 0; more than alpha favours recall. Both 0.5: the dice loss; both 1: the
            soft Jaccard loss.
    """

    @check_annotations
    def __init__(
        self,
        class_weights: Tensor,
        ignore_index: int = 255,
        alpha: NotNegative = 0.3,
        beta: Positive = 0.7,
    ) -> None:
        super().__init__(class_weights, ignore_index)
        check_classes(class_weights)
        self.alpha, self.beta = alpha, beta

    def forward(self, prediction: Prediction, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, and `weight`: the number of images with a labelled pixel."""
        sums = pixel_sums(prediction, batch, self.ignore_index, overlap_sums, form=KernelSpec())
        value = tversky_loss(sums, self.weight, self.alpha, self.beta)
        return value, {"weight": labelled_images(batch.mask, self.ignore_index).to(value.dtype)}


class Dice(Tversky):
    """Soft dice loss (Milletari et al., arXiv 1606.04797, without squares in the denominator, for K classes).

    It is the weighted mean of 1 - 2 sum(p_k g_k) / (sum p_k + sum g_k) over the classes k that occur in the labels.
    Sums are over all labelled pixels of the batch, p is the softmax and g the labels. There is no smoothing term: a
    class that occurs has a denominator of at least one pixel.

    Args:
        class_weights: one weight (K,) per class, in the mean over the classes that occur.
        ignore_index: mask value of unlabelled pixels.
    """

    def __init__(self, class_weights: Tensor, ignore_index: int = 255) -> None:
        super().__init__(class_weights, ignore_index, 0.5, 0.5)
