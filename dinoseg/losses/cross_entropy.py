"""Cross-entropy on every labelled pixel, at the labels' own resolution."""

import torch
from torch import Tensor

from dinoseg.contracts import Loss
from dinoseg.errors import UserError
from dinoseg.losses.full_resolution import Pull, pixel_sums
from dinoseg.losses.fused import Form
from dinoseg.losses.labelled import UNLABELLED, pixel_weights, ratio, weights_of
from dinoseg.ranges import LowShare
from dinoseg.shapes import Batch, Prediction


class CrossEntropy(Loss):
    """Cross-entropy over pixels, the class scores brought to the masks' size tile by tile (`full_resolution.py`).

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
        form = Form(self.weight, self.label_smoothing)
        total, weight = pixel_sums(prediction, batch, self.ignore_index, self._sums, first_alone=True, form=form)
        return ratio(total, weight.detach()), {"weight": weight.detach()}

    def _sums(self, scores: Tensor, target: Tensor) -> tuple[Tensor, Pull]:
        """Return the total and the summed weights of a tile's pixels: a `full_resolution.Term`.

        With q = (1 - s) w_t on the label t and s w_k / K beside, a pixel costs the sum over k of -q_k log p_k.
        """
        weights = weights_of(self.weight, scores)
        place = target.clamp(min=0)[None]
        weight = pixel_weights(target, weights)
        own = (1 - self.label_smoothing) * weight  # (N,)
        even = (target != UNLABELLED).to(scores.dtype) * (self.label_smoothing / len(scores))
        scores.sub_(scores.amax(0))
        expected = own * scores.gather(0, place)[0]
        if self.label_smoothing:
            expected += even * (weights @ scores)
        norm = scores.exp_().sum(0)
        mass = own + even * weights.sum()
        total = (mass * norm.log() - expected).sum()

        def pull(upstream: Tensor) -> Tensor:  # q_k summed times p, less q
            scores.mul_(mass * upstream[0] / norm).scatter_add_(0, place, (-upstream[0] * own)[None])
            return scores.addr_(weights, even * upstream[0], alpha=-1) if self.label_smoothing else scores

        return torch.stack([total, weight.sum()]), pull
