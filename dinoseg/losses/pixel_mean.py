"""Mean of pixel losses, over the labelled pixels, the hardest ones of each image, or all pixels of the masks."""

from collections.abc import Hashable
from dataclasses import dataclass
from math import ceil
from typing import Literal

import torch
from torch import Tensor

from dinoseg.core.contracts import Loss, safe_divide
from dinoseg.core.shapes import Batch, Prediction
from dinoseg.core.targets import UNLABELLED, label_ids
from dinoseg.losses.full_resolution import Vjp, pixel_sums, pixel_values
from dinoseg.losses.fused import KernelSpec
from dinoseg.losses.labelled import check_classes
from dinoseg.utils.devices import to_device
from dinoseg.utils.errors import UserError
from dinoseg.utils.ranges import HighShare

Average = Literal["labelled", "all"]


@dataclass(frozen=True)
class Hardest:
    """Selection of the hardest pixels of an image: a share of its labelled pixels with the highest loss.

    Online hard example mining (Shrivastava et al., arXiv 1604.03540) for pixels, within each image, so that it does
    not depend on the batch. Pixels that tie with the last selected one are selected too.

    Args:
        share: of the labelled pixels, at least one; 1 selects all.
    """

    share: float = 1.0

    @torch.no_grad()
    def select_pixels(self, costs: Tensor, labelled: Tensor) -> Tensor:
        """Return the selected pixels (B, H, W) bool by their losses; NaN losses are selected too."""
        least = torch.full_like(costs[:, :1, :1], torch.inf)
        for row, (row_costs, known) in enumerate(zip(costs, labelled, strict=True)):
            if count := int(known.sum()):
                # `kthvalue` counts from the smallest: the least loss among the ceil(share n) highest
                least[row] = row_costs[known].kthvalue(count - ceil(self.share * count) + 1).values
        # not `>=`, which is false for NaN: a loss that is not finite has to stop the training, not to be left out
        return labelled & ~(costs < least)


class PixelMean(Loss):
    """Base class of losses that are means over pixels; class scores are upsampled tile by tile (`full_resolution.py`).

    A subclass implements `pixel_cost`.

    Args:
        class_weights: one weight (K,) per class; the mean is over the summed weights, as in
            `torch.nn.functional.cross_entropy`.
        ignore_index: mask value of unlabelled pixels.
        hard_fraction: share of the labelled pixels of each image, those with the highest loss, that the mean is over.
        average: `labelled`, the mean over the summed weights of the labelled pixels; or `all`, the sum divided by the
            number of all pixels, ignored ones and padding included, whatever their weights. The latter is
            `avg_non_ignore=False` of open-mmlab/mmsegmentation (mmseg/models/losses/cross_entropy_loss.py) and the
            loss of facebookresearch/dinov3 (dinov3/eval/segmentation/loss.py).

    Raises:
        UserError: `average="all"` with a selection: pixels that are not selected count in no mean.
    """

    weight: Tensor

    def __init__(
        self,
        class_weights: Tensor,
        ignore_index: int,
        hard_fraction: HighShare,
        average: Average,
    ) -> None:
        super().__init__()
        check_classes(class_weights)
        self.register_buffer("weight", class_weights, persistent=False)
        self.ignore_index, self.average = ignore_index, average
        self.hardest = Hardest(hard_fraction)
        if average == "all" and hard_fraction < 1:
            raise UserError(
                f"average=all and hard_fraction={hard_fraction} exclude each other: the mean is over "
                "the hardest pixels or over all pixels. Leave one of the two out."
            )
        self.divisor = self._divisor()

    def pixel_cost(self, scores: Tensor, target: Tensor, counted: Tensor) -> tuple[Tensor, Tensor, Vjp]:
        """Return the loss of each pixel in a tile, its weight and the gradient function: a `full_resolution.Cost`."""
        raise NotImplementedError

    def kernel(self) -> KernelSpec | None:
        """Return the loss in the form of the CUDA kernel, which supports no pixel weights; None: it has none."""
        return None

    def forward(self, prediction: Prediction, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, and `weight`: the summed weights that it is averaged over, or the number of all pixels.

        A batch without labelled pixels gives a loss of 0, and a weight of 0 unless all pixels count. Selecting the
        hardest pixels takes an additional pass.
        """
        weights = None
        if self.hardest.share < 1:
            costs = pixel_values(prediction, batch, self.ignore_index, lambda *tile: self.pixel_cost(*tile)[0])
            # the selection needs the losses of a whole image, and the sums need the selection: two passes over the
            # tiles
            weights = self.hardest.select_pixels(costs, batch.mask != self.ignore_index).to(costs.dtype)
        total, weight = pixel_sums(
            prediction, batch, self.ignore_index, self._sums, weights=weights, first_alone=True, form=self.kernel()
        )
        weight = total.new_full((), batch.mask.numel()) if self.average == "all" else weight.detach()
        return safe_divide(total, weight), {"weight": weight}

    def divisors(self, batch: Batch) -> Tensor:
        """Return the summed weights (1,) of the labelled pixels, hardest or not, or the number of all pixels."""
        if self.average == "all":
            return self.weight.new_full((1,), batch.mask.numel())
        mask = to_device(batch.mask, self.weight.device)
        target = label_ids(mask, self.ignore_index)
        weights = self.weight[target.clamp(min=0)]
        return torch.where(target == UNLABELLED, 0, weights).sum()[None]

    def _divisor(self) -> Hashable:
        """Return what the divisor of the mean depends on, or None if it depends on the scores."""
        if self.average == "all":
            return "all pixels"
        # which pixels count, and with them the sum of their weights, is known after the forward pass only
        if self.hardest.share < 1:
            return None
        weights = () if self.weight.is_meta else tuple(self.weight.tolist())  # meta tensors have no values
        return ("labelled pixels", self.ignore_index, weights)

    def _sums(self, scores: Tensor, target: Tensor, counted: Tensor) -> tuple[Tensor, Vjp]:
        costs, weights, pull = self.pixel_cost(scores, target, counted)
        return torch.stack([costs.sum(), weights.sum()]), pull
