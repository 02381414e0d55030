"""Lovasz-softmax: a convex stand-in for 1 - IoU."""

import torch
from torch import Tensor

from dinoseg.core.contracts import Loss
from dinoseg.core.shapes import Batch, Prediction
from dinoseg.losses.labelled import UNLABELLED, image_count, labelled_images, labelled_pixels, ratio


@torch.no_grad()
def jaccard_steps(errors: Tensor, is_class: Tensor) -> Tensor:
    """Return by how much each pixel raises the Jaccard loss when pixels go wrong in the order of their errors.

    The g of Berman et al., arXiv 1705.08790, definition 2 and algorithm 1. Where the first i pixels are wrong, the
    loss is 1 - I / U: a pixel of the class takes 1 from I, which costs 1 / U; any other adds 1 to U, which costs
    I / (U (U - 1)). So said, nothing cancels, as differences of nearly equal losses do in float32.

    Args:
        errors: (N,).
        is_class: (N,) bool, at least one of them true.
    """
    order = errors.argsort(descending=True)
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
    for k in target.unique().tolist():
        is_class = target == k
        errors = torch.where(is_class, 1 - shares[:, k], shares[:, k])
        total = total + class_weights[k] * errors.dot(jaccard_steps(errors, is_class))
        norm = norm + class_weights[k]
    return ratio(total, norm)


class Lovasz(Loss):
    """The `lovasz_softmax` loss of all labelled pixels of a batch, or the mean of its images' own.

    Args:
        class_weights: one weight (K,) per class, in the mean over the classes that occur.
        ignore_index: mask value that counts for nothing.
        per_image: whether each image stands for itself (with its own classes), or all pixels of the batch are one.
    """

    weight: Tensor

    def __init__(self, class_weights: Tensor, ignore_index: int = 255, per_image: bool = False) -> None:
        super().__init__()
        self.register_buffer("weight", class_weights, persistent=False)
        self.ignore_index = ignore_index
        self.divisor = ("images", ignore_index)
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
        value = ratio(torch.stack(values).sum(), images) if self.per_image else values[0]
        return value, {"weight": images}

    def divisors(self, batch: Batch) -> Tensor:
        """Return the number of images with a labelled pixel (1,)."""
        return image_count(batch, self.ignore_index, self.weight)
