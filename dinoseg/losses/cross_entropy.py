"""Cross-entropy over labelled pixels at the resolution of the labels."""

from torch import Tensor

from dinoseg.core.contracts import Loss
from dinoseg.core.shapes import Batch, Prediction
from dinoseg.losses.border import Border
from dinoseg.losses.full_resolution import Vjp
from dinoseg.losses.fused import KernelSpec
from dinoseg.losses.labelled import weights_of
from dinoseg.losses.pixel_mean import Hardest, check_average, pixel_divisor, pixel_mean, pixel_weight
from dinoseg.utils.errors import UserError
from dinoseg.utils.ranges import Count, HighShare, LowShare, NotNegative


class CrossEntropy(Loss):
    """Cross-entropy over pixels; class scores are upsampled to the mask size tile by tile (`full_resolution.py`).

    Args:
        class_weights: one weight (K,) per class; the mean is over the summed weights, as in
            `torch.nn.functional.cross_entropy`.
        ignore_index: mask value of unlabelled pixels.
        label_smoothing: share of the target spread evenly over the classes, in [0, 1).
        hard_fraction: share of the labelled pixels of each image, those with the highest loss, that the mean is over.
        border_weight: weight of pixels near a class border; all others have 1.
        border_width: distance in pixels up to which a pixel is near a border.
        average: `labelled`, the mean over the summed weights of the labelled pixels; or `all`, the sum divided by the
            number of all pixels, ignored ones and padding included, whatever their weights. The latter is
            `avg_non_ignore=False` of open-mmlab/mmsegmentation (mmseg/models/losses/cross_entropy_loss.py) and the
            loss of facebookresearch/dinov3 (dinov3/eval/segmentation/loss.py).
    """

    weight: Tensor

    def __init__(
        self,
        class_weights: Tensor,
        ignore_index: int = 255,
        label_smoothing: LowShare = 0.0,
        hard_fraction: HighShare = 1.0,
        border_weight: NotNegative = 1.0,
        border_width: Count = 3,
        average: str = "labelled",
    ) -> None:
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise UserError(f"loss.criterion.label_smoothing={label_smoothing}: give a number from 0 up to below 1.")
        self.register_buffer("weight", class_weights, persistent=False)
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.border, self.hardest = Border(border_weight, border_width), Hardest(hard_fraction)
        self.average = check_average(average, self.hardest)
        self.divisor = pixel_divisor(ignore_index, self.border, self.hardest, class_weights, average)

    def forward(self, prediction: Prediction, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, and `weight`: the summed weights that it is averaged over, or the number of all pixels.

        A batch without labelled pixels gives a loss of 0.
        """
        return pixel_mean(
            prediction,
            batch,
            self.ignore_index,
            self._cost,
            border=self.border,
            hardest=self.hardest,
            average=self.average,
            form=KernelSpec(self.weight, self.label_smoothing),
        )

    def divisors(self, batch: Batch) -> Tensor:
        """Return the summed weights (1,) of the labelled pixels, or the number of all pixels."""
        return pixel_weight(batch, self.ignore_index, self.weight, self.border, self.average)

    def _cost(self, scores: Tensor, target: Tensor, counted: Tensor) -> tuple[Tensor, Tensor, Vjp]:
        """Return the loss of each pixel in a tile, its weight and the gradient function: a `full_resolution.Cost`.

        With q = (1 - s) w_t for the label t, plus s w_k / K for each class k, the loss is the sum over k of -q_k log
        p_k.
        """
        weights = weights_of(self.weight, scores)
        index = target.clamp(min=0)[None]
        weight = weights[index[0]] * counted
        label_weight = (1 - self.label_smoothing) * weight  # (N,)
        even = counted * (self.label_smoothing / len(scores))
        scores.sub_(scores.amax(0))
        expected = label_weight * scores.gather(0, index)[0]
        if self.label_smoothing:
            expected += even * (weights @ scores)
        norm = scores.exp_().sum(0)
        mass = label_weight + even * weights.sum()
        costs = mass * norm.log() - expected

        def pull(upstream: Tensor) -> Tensor:  # sum(q) p - q
            scores.mul_(mass * upstream[0] / norm).scatter_add_(0, index, (-upstream[0] * label_weight)[None])
            return scores.addr_(weights, even * upstream[0], alpha=-1) if self.label_smoothing else scores

        return costs, weight, pull
