"""Focal loss: cross-entropy that looks away from the pixels that are right already."""

import torch
from torch import Tensor

from dinoseg.contracts import Loss
from dinoseg.errors import UserError
from dinoseg.losses.labelled import labelled_pixels, pixel_weights, ratio
from dinoseg.ranges import NotNegative
from dinoseg.shapes import Batch, Prediction


class Focal(Loss):
    """Focal loss over pixels (Lin et al., arXiv 1708.02002, equation 5, with a softmax over K classes).

    A pixel of class t costs -w_t (1 - p_t)^gamma log p_t, w the class weights in the place of alpha. The normaliser
    is the summed class weights of the labelled pixels, so gamma = 0 is weighted cross-entropy. (The paper divides by
    the number of matched anchors, which pixels do not have.)

    Args:
        class_weights: one weight (K,) per class.
        ignore_index: mask value that counts for nothing.
        gamma: how much easy pixels fade, at least 0.
    """

    weight: Tensor

    def __init__(self, class_weights: Tensor, ignore_index: int = 255, gamma: NotNegative = 2.0) -> None:
        super().__init__()
        if not gamma >= 0:
            raise UserError(f"loss.criterion.gamma={gamma}: give a number of at least 0; 0 is cross-entropy.")
        self.register_buffer("weight", class_weights, persistent=False)
        self.ignore_index = ignore_index
        self.gamma = gamma

    def forward(self, prediction: Prediction, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, and `weight`: the summed class weights that it is a mean over."""
        logits, target = labelled_pixels(prediction, batch, self.ignore_index)
        weights = pixel_weights(target, self.weight.to(logits.dtype))
        log_share = logits.log_softmax(1).gather(1, target.clamp(min=0)[:, None])[:, 0]  # log p_t, (B, H, W)
        # at p_t = 1 the slope of a power below 1 is infinite, and infinity times the 0 after it is not a number
        missing = -torch.expm1(log_share)  # 1 - p_t
        missing = missing.clamp(min=torch.finfo(logits.dtype).tiny)
        total = -(weights * missing**self.gamma * log_share).sum()
        weight = weights.sum()
        return ratio(total, weight), {"weight": weight}
