"""Cross-entropy over labelled pixels at the resolution of the labels."""

from torch import Tensor

from dinoseg.losses.full_resolution import Vjp
from dinoseg.losses.fused import KernelSpec
from dinoseg.losses.pixel_mean import Average, PixelMean
from dinoseg.utils.ranges import HighShare, LowShare, check_annotations


class CrossEntropy(PixelMean):
    """Cross-entropy over pixels.

    Args:
        class_weights: one weight (K,) per class, see `PixelMean`.
        ignore_index: mask value of unlabelled pixels.
        label_smoothing: share of the target spread evenly over the classes, in [0, 1).
        hard_fraction: see `PixelMean`.
        average: see `PixelMean`.
    """

    @check_annotations
    def __init__(
        self,
        class_weights: Tensor,
        ignore_index: int = 255,
        label_smoothing: LowShare = 0.0,
        hard_fraction: HighShare = 1.0,
        average: Average = "labelled",
    ) -> None:
        super().__init__(class_weights, ignore_index, hard_fraction, average)
        self.label_smoothing = label_smoothing

    def kernel(self) -> KernelSpec:
        """Return class weights and label smoothing for the CUDA kernel."""
        return KernelSpec(self.weight, self.label_smoothing)

    def pixel_cost(self, scores: Tensor, target: Tensor, counted: Tensor) -> tuple[Tensor, Tensor, Vjp]:
        """Return the loss of each pixel in a tile, its weight and the gradient function: a `full_resolution.Cost`.

        With q = (1 - s) w_t for the label t, plus s w_k / K for each class k, the loss is the sum over k of -q_k log
        p_k.
        """
        weights = self.weight.to(scores.dtype).expand(len(scores))  # refuses another number of classes
        index = target.clamp(min=0)[None]
        weight = weights[index[0]] * counted
        label_weight = (1 - self.label_smoothing) * weight  # (N,)
        even = counted * (self.label_smoothing / len(scores))
        # in place: a tile's scores are its largest tensor; shifted by the maximum, no exponential overflows
        scores.sub_(scores.amax(0))
        expected = label_weight * scores.gather(0, index)[0]
        if self.label_smoothing:
            expected += even * (weights @ scores)
        # -sum_k q_k log p_k = sum_k q_k log sum_j exp(s_j) - sum_k q_k s_k, without a tensor of log p
        norm = scores.exp_().sum(0)
        mass = label_weight + even * weights.sum()
        costs = mass * norm.log() - expected

        # the gradient by the scores is sum(q) p - q
        def pull(upstream: Tensor) -> Tensor:
            scores.mul_(mass * upstream[0] / norm).scatter_add_(0, index, (-upstream[0] * label_weight)[None])
            return scores.addr_(weights, even * upstream[0], alpha=-1) if self.label_smoothing else scores

        return costs, weight, pull
