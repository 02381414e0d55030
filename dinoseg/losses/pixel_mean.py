"""The weighted mean of what pixels cost: over all that are labelled, or over the hardest of each image."""

from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor

from dinoseg.core.shapes import Batch, Prediction
from dinoseg.losses.border import Border
from dinoseg.losses.full_resolution import Cost, Pull, pixel_sums, pixel_values
from dinoseg.losses.fused import Form
from dinoseg.losses.labelled import UNLABELLED, labels, ratio
from dinoseg.utils.errors import UserError
from dinoseg.utils.ranges import HighShare
from dinoseg.utils.transfer import sent


@dataclass(frozen=True)
class Hardest:
    """Which pixels of an image count: those that cost most, a share of its labelled ones.

    Online hard example mining (Shrivastava et al., arXiv 1604.03540) of pixels, in each image by itself, so that it
    depends on no batch. Pixels that cost as much as the last one of the share count too.

    Args:
        share: of the labelled pixels, at least one; 1: all count.
    """

    share: HighShare = 1.0

    def __post_init__(self) -> None:
        """Refuse what is no share."""
        if not 0 < self.share <= 1:
            raise UserError(
                f"loss.criterion.hardest={self.share}: give a share of the pixels above 0 and at most 1, which is all."
            )

    @torch.no_grad()
    def kept(self, costs: Tensor, labelled: Tensor) -> Tensor:
        """Return which pixels (B, H, W) bool count, by what each costs; one that costs no number counts too."""
        least = torch.full_like(costs[:, :1, :1], torch.inf)
        for row, (own, known) in enumerate(zip(costs, labelled, strict=True)):
            if count := int(known.sum()):
                least[row] = own[known].kthvalue(count - ceil(self.share * count) + 1).values
        return labelled & ~(costs < least)


class PixelDivisor(NamedTuple):
    """The summed weights of the labelled pixels, named by what these weights depend on."""

    ignore_index: int
    border: Border | None  # None: all pixels of a class count alike
    class_weights: tuple[float, ...]


def pixel_divisor(ignore_index: int, border: Border, hardest: Hardest, class_weights: Tensor) -> PixelDivisor | None:
    """Return the divisor of `pixel_mean`; None: it depends on the scores."""
    if hardest.share < 1:
        return None
    weights = () if class_weights.is_meta else tuple(class_weights.tolist())  # meta: the model's outline is built
    return PixelDivisor(ignore_index, border if border.weight != 1 else None, weights)


def pixel_weight(batch: Batch, ignore_index: int, class_weights: Tensor, border: Border) -> Tensor:
    """Return the summed weights (1,) of a batch's labelled pixels, all of them whatever share is the hardest."""
    mask = sent(batch.mask, class_weights.device)
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
    form: Form | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the mean of what pixels cost over their summed weights, and these as `weight`.

    A batch without a labelled pixel gives 0 and a weight of 0.

    Args:
        prediction: see `pixel_sums`.
        batch: likewise.
        ignore_index: mask value that counts for nothing.
        cost: of the pixels of a tile.
        border: weighs pixels; those that are hardest are so with their weight.
        hardest: chooses pixels, by one pass more over their scores.
        form: the cost as a kernel of CUDA knows it, which takes all pixels alike.
    """

    def sums(scores: Tensor, target: Tensor, counted: Tensor) -> tuple[Tensor, Pull]:
        costs, weights, pull = cost(scores, target, counted)
        return torch.stack([costs.sum(), weights.sum()]), pull

    weights = border.weights(batch.mask, ignore_index)
    if hardest.share < 1:
        costs = pixel_values(prediction, batch, ignore_index, lambda *tile: cost(*tile)[0], weights=weights)
        kept = hardest.kept(costs, batch.mask != ignore_index)
        weights = kept.to(costs.dtype) if weights is None else weights * kept
    total, weight = pixel_sums(prediction, batch, ignore_index, sums, weights=weights, first_alone=True, form=form)
    return ratio(total, weight.detach()), {"weight": weight.detach()}
