"""Lovasz-softmax loss: a convex surrogate of 1 - IoU."""

import torch
from torch import Tensor

from dinoseg.core.contracts import safe_divide
from dinoseg.core.shapes import Batch, Prediction
from dinoseg.core.targets import UNLABELLED
from dinoseg.losses.labelled import ImageLoss, check_classes, labelled_images, labelled_pixels
from dinoseg.utils.ranges import check_annotations


@torch.no_grad()
def jaccard_steps(errors: Tensor, is_class: Tensor) -> Tensor:
    """Return the increase of the Jaccard loss by each pixel, if pixels turn wrong by descending error.

    The g of Berman et al., arXiv 1705.08790, definition 2 and algorithm 1. If the first i pixels are wrong, the loss
    is 1 - I / U. A pixel of the class reduces I by 1, which costs 1 / U; any other increases U by 1, which costs I /
    (U (U - 1)). These closed forms avoid the cancellation of nearly equal losses in float32.

    Args:
        errors: (N,).
        is_class: (N,) bool, at least one of them true.
    """
    order = errors.argsort(descending=True)
    # pixels turn wrong in this order: I falls by those of the class, U grows by the others
    inside = is_class[order]
    seen = inside.cumsum(0)
    intersection = seen[-1] - seen
    union = intersection + torch.arange(1, len(order) + 1, device=order.device)
    outside_step = intersection.to(errors.dtype) / (union * (union - 1)).clamp(min=1)
    steps = torch.where(inside, 1 / union.to(errors.dtype), outside_step)
    return torch.empty_like(steps).scatter_(0, order, steps)


def lovasz_softmax(shares: Tensor, target: Tensor, class_weights: Tensor) -> Tensor:
    """Return the weighted mean of the Lovasz extension of each class's Jaccard loss, over the classes that occur.

    The pixel errors of class k are 1 - p_k on its own pixels and p_k elsewhere.

    Args:
        shares: class probabilities p (N, K).
        target: class ids (N,).
        class_weights: (K,).
    """
    total, norm = shares[:0].sum(), class_weights.new_zeros(())
    # classes that do not occur are left out, as by the authors (`classes='present'`)
    for k in target.unique().tolist():
        is_class = target == k
        errors = torch.where(is_class, 1 - shares[:, k], shares[:, k])
        # `dot` adds one by one: 1e-4 of relative error on large images; `sum` adds in pairs
        total = total + class_weights[k] * (errors * jaccard_steps(errors, is_class)).sum()
        norm = norm + class_weights[k]
    return safe_divide(total, norm)


class Lovasz(ImageLoss):
    """The `lovasz_softmax` loss over all labelled pixels of a batch, or its mean over the images.

    Args:
        class_weights: one weight (K,) per class, in the mean over the classes that occur.
        ignore_index: mask value of unlabelled pixels.
        per_image: whether to compute the loss per image (with its own classes) instead of over the whole batch.
    """

    @check_annotations
    def __init__(self, class_weights: Tensor, ignore_index: int = 255, per_image: bool = False) -> None:
        super().__init__(class_weights, ignore_index)
        check_classes(class_weights)
        self.per_image = per_image
        self.sums_over_batch = not per_image

    def forward(self, prediction: Prediction, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, and `weight`: the number of images with a labelled pixel."""
        logits, target = labelled_pixels(prediction, batch, self.ignore_index)
        shares = logits.softmax(1).movedim(1, -1)  # (B, H, W, K)
        class_weights = self.weight.to(logits.dtype)
        groups = zip(shares, target, strict=True) if self.per_image else [(shares, target)]
        values = [
            lovasz_softmax(part[ids != UNLABELLED], ids[ids != UNLABELLED], class_weights) for part, ids in groups
        ]
        images = labelled_images(batch.mask, self.ignore_index).to(logits.dtype)
        value = safe_divide(torch.stack(values).sum(), images) if self.per_image else values[0]
        return value, {"weight": images}
