"""Tversky loss: overlap per class, with false positives and false negatives priced apart."""

import torch
from torch import Tensor

from dinoseg.contracts import Loss
from dinoseg.errors import UserError
from dinoseg.losses.labelled import UNLABELLED, labelled_images, labelled_pixels, ratio
from dinoseg.ranges import NotNegative
from dinoseg.shapes import Batch, Prediction


def tversky_loss(logits: Tensor, target: Tensor, class_weights: Tensor, alpha: float, beta: float) -> Tensor:
    """Return the weighted mean of 1 - T_k over the classes k that occur in the labels of the batch.

    T_k = TP / (TP + alpha FP + beta FN), with the soft counts TP = sum p_k g_k, FP = sum p_k (1 - g_k) and
    FN = sum (1 - p_k) g_k over all labelled pixels of the batch, p the softmax and g the labels (Salehi et al.,
    arXiv 1706.05721, for K classes).

    Args:
        logits: (B, K, H, W).
        target: (B, H, W), UNLABELLED where nothing counts.
        class_weights: (K,).
        alpha: price of a false positive.
        beta: price of a false negative.
    """
    shares = logits.softmax(1)
    is_class = target[:, None] == torch.arange(logits.shape[1], device=target.device)[:, None, None]  # (B, K, H, W)
    hits = torch.where(is_class, shares, 0).sum((0, 2, 3))  # (K,)
    claimed = torch.where((target != UNLABELLED)[:, None], shares, 0).sum((0, 2, 3))
    wanted = is_class.sum((0, 2, 3))
    present = wanted > 0
    denominator = hits + alpha * (claimed - hits) + beta * (wanted - hits)
    index = hits / torch.where(present, denominator, 1)
    weights = torch.where(present, class_weights, 0)
    return ratio((weights * (1 - index)).sum(), weights.sum())


class Tversky(Loss):
    """The `tversky_loss` of a batch.

    Args:
        class_weights: one weight (K,) per class, in the mean over the classes that occur.
        ignore_index: mask value that counts for nothing.
        alpha: price of a false positive, at least 0.
        beta: price of a false negative, above 0; more than alpha favours recall. Both 0.5: the dice loss; both 1:
            the soft Jaccard loss.
    """

    weight: Tensor

    def __init__(
        self, class_weights: Tensor, ignore_index: int = 255, alpha: NotNegative = 0.3, beta: NotNegative = 0.7
    ) -> None:
        super().__init__()
        if not alpha >= 0:
            raise UserError(f"loss.criterion.alpha={alpha}: give a price of false positives of at least 0.")
        if not beta > 0:
            raise UserError(f"loss.criterion.beta={beta}: give a price of false negatives above 0.")
        self.register_buffer("weight", class_weights, persistent=False)
        self.ignore_index = ignore_index
        self.alpha, self.beta = alpha, beta

    def forward(self, prediction: Prediction, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, and `weight`: the number of images with a labelled pixel."""
        logits, target = labelled_pixels(prediction, batch, self.ignore_index)
        value = tversky_loss(logits, target, self.weight.to(logits.dtype), self.alpha, self.beta)
        return value, {"weight": labelled_images(target).sum().to(value.dtype)}
