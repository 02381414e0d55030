"""Mean of pixel losses, over the labelled pixels, the hardest ones of each image, or all pixels of the masks."""

from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor

from dinoseg.core.shapes import Batch, Prediction
from dinoseg.losses.border import Border
from dinoseg.losses.full_resolution import Cost, Vjp, pixel_sums, pixel_values
from dinoseg.losses.fused import KernelSpec
from dinoseg.losses.labelled import UNLABELLED, labels, ratio
from dinoseg.utils.errors import UserError
from dinoseg.utils.ranges import HighShare
from dinoseg.utils.transfer import to_device

AVERAGES = ("labelled", "all")
ALL_PIXELS = "all pixels"  # divisor of average=all


@dataclass(frozen=True)
class Hardest:
    """Selection of the hardest pixels of an image: a share of its labelled pixels with the highest loss.

    Online hard example mining (Shrivastava et al., arXiv 1604.03540) for pixels, within each image, so that it does
    not depend on the batch. Pixels that tie with the last selected one are selected too.

    Args:
        share: of the labelled pixels, at least one; 1 selects all.
    """

    share: HighShare = 1.0

    def __post_init__(self) -> None:
        """Refuse an invalid share."""
        if not 0 < self.share <= 1:
            raise UserError(
                f"loss.criterion.hard_fraction={self.share}: give a fraction of the pixels above 0 and at most 1."
            )

    @torch.no_grad()
    def selected(self, costs: Tensor, labelled: Tensor) -> Tensor:
        """Return the selected pixels (B, H, W) bool by their losses; NaN losses are selected too."""
        least = torch.full_like(costs[:, :1, :1], torch.inf)
        for row, (row_costs, known) in enumerate(zip(costs, labelled, strict=True)):
            if count := int(known.sum()):
                least[row] = row_costs[known].kthvalue(count - ceil(self.share * count) + 1).values
        return labelled & ~(costs < least)


class PixelDivisor(NamedTuple):
    """Key of the summed weights of the labelled pixels: the options that these weights depend on."""

    ignore_index: int
    border: Border | None  # None: all pixels of a class have the same weight
    class_weights: tuple[float, ...]


def check_average(average: str, hardest: Hardest) -> str:
    """Return `average` if it is one of `AVERAGES` and fits the selection of pixels.

    Raises:
        UserError: it is unknown, or `all` with a selection: pixels that are not selected count in no mean.
    """
    if average not in AVERAGES:
        raise UserError(f"loss.criterion.average={average} is unknown. Choose one of {', '.join(AVERAGES)}.")
    if average == "all" and hardest.share < 1:
        raise UserError(
            f"loss.criterion.average=all and hard_fraction={hardest.share} exclude each other: the mean is over the "
            "hardest pixels or over all pixels. Leave one of the two out."
        )
    return average


def pixel_divisor(
    ignore_index: int, border: Border, hardest: Hardest, class_weights: Tensor, average: str
) -> PixelDivisor | str | None:
    """Return the divisor of `pixel_mean`, or None if it depends on the scores."""
    if average == "all":
        return ALL_PIXELS
    if hardest.share < 1:
        return None
    weights = () if class_weights.is_meta else tuple(class_weights.tolist())  # meta tensors have no values
    return PixelDivisor(ignore_index, border if border.weight != 1 else None, weights)


def pixel_weight(batch: Batch, ignore_index: int, class_weights: Tensor, border: Border, average: str) -> Tensor:
    """Return the summed weights (1,) of all labelled pixels of a batch, including those that are not the hardest.

    For average=all it is the number of pixels.
    """
    if average == "all":
        return class_weights.new_full((1,), batch.mask.numel())
    mask = to_device(batch.mask, class_weights.device)
    target = labels(mask, ignore_index)
    weights = class_weights[target.clamp(min=0)]
    near = border.weights(mask, ignore_index)
    weights = weights if near is None else weights * near
    return torch.where(target == UNLABELLED, 0, weights).sum()[None]


def pixel_mean(
    prediction: Prediction,
    batch: Batch,
    ignore_index: int,
    cost: Cost,
    *,
    border: Border,
    hardest: Hardest,
    average: str,
    form: KernelSpec | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the mean pixel loss over the summed weights, and these as `weight`.

    A batch without labelled pixels gives a loss of 0, and a weight of 0 unless all pixels count.

    Args:
        prediction: see `pixel_sums`.
        batch: see `pixel_sums`.
        ignore_index: mask value of unlabelled pixels.
        cost: function of the pixels of a tile.
        border: weights of pixels near class borders; they also enter the losses that select the hardest pixels.
        hardest: selection of pixels, which takes an additional pass over their scores.
        average: `labelled`; or `all`, which divides the sum over the labelled pixels by the number of all pixels.
        form: the cost in the form of the CUDA kernel, which supports no pixel weights.
    """

    def sums(scores: Tensor, target: Tensor, counted: Tensor) -> tuple[Tensor, Vjp]:
        costs, weights, pull = cost(scores, target, counted)
        return torch.stack([costs.sum(), weights.sum()]), pull

    weights = border.weights(batch.mask, ignore_index)
    if hardest.share < 1:
        costs = pixel_values(prediction, batch, ignore_index, lambda *tile: cost(*tile)[0], weights=weights)
        selected = hardest.selected(costs, batch.mask != ignore_index)
        weights = selected.to(costs.dtype) if weights is None else weights * selected
    total, weight = pixel_sums(prediction, batch, ignore_index, sums, weights=weights, first_alone=True, form=form)
    weight = total.new_full((), batch.mask.numel()) if average == "all" else weight.detach()
    return ratio(total, weight), {"weight": weight}
