"""Focal loss: cross-entropy with reduced weight for well-classified pixels."""

import torch
from torch import Tensor

from dinoseg.losses.full_resolution import Vjp
from dinoseg.losses.pixel_mean import Average, PixelMean
from dinoseg.utils.ranges import HighShare, NotNegative, check_annotations


class Focal(PixelMean):
    """Focal loss over pixels (Lin et al., arXiv 1708.02002, equation 5, with a softmax over K classes).

    The loss of a pixel of class t is -w_t (1 - p_t)^gamma log p_t, with the class weights w instead of alpha. It is
    normalised by the summed class weights of the labelled pixels, so gamma = 0 is weighted cross-entropy. (The paper
    divides by the number of matched anchors, which do not exist for pixels.)

    Args:
        class_weights: one weight (K,) per class.
        ignore_index: mask value of unlabelled pixels.
        gamma: focusing parameter, at least 0; higher values reduce the weight of easy pixels.
        hard_fraction: see `PixelMean`.
        average: see `PixelMean`.
    """

    @check_annotations
    def __init__(
        self,
        class_weights: Tensor,
        ignore_index: int = 255,
        gamma: NotNegative = 2.0,
        hard_fraction: HighShare = 1.0,
        average: Average = "labelled",
    ) -> None:
        super().__init__(class_weights, ignore_index, hard_fraction, average)
        self.gamma = gamma

    def pixel_cost(self, scores: Tensor, target: Tensor, counted: Tensor) -> tuple[Tensor, Tensor, Vjp]:
        """Return the loss of each pixel in a tile, its weight and the gradient function: a `full_resolution.Cost`."""
        index = target.clamp(min=0)[None]
        weights = self.weight.to(scores.dtype).expand(len(scores))  # refuses another number of classes
        weight = weights[index[0]] * counted  # (N,)
        scores.sub_(scores.amax(0))
        label_score = scores.gather(0, index)[0]
        norm = scores.exp_().sum(0)
        log_share = label_score - norm.log()  # log p_t
        # at p_t = 1 a power below 1 has an infinite slope, and inf * 0 would be NaN
        missing = (-torch.expm1(log_share)).clamp(min=torch.finfo(scores.dtype).tiny)  # 1 - p_t
        faded = weight * missing**self.gamma

        def pull(upstream: Tensor) -> Tensor:
            # d/dx of -w (1 - p)^g x at x = log p: w g (1 - p)^(g - 1) p x - w (1 - p)^g
            rise = self.gamma * weight * missing ** (self.gamma - 1) * log_share.exp() * log_share
            slope = upstream[0] * (rise - faded)  # derivative by log p_t
            # d log p_t / d s_k = [k = t] - p_k
            return scores.mul_(-slope / norm).scatter_add_(0, index, slope[None])

        return -(faded * log_share), weight, pull
