"""Loss on masks and on a teacher's pseudo-labels (FixMatch, arXiv 2001.07685; UniMatch V2, arXiv 2410.10777)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dinoseg.core.contracts import Loss, safe_divide
from dinoseg.core.shapes import Batch, Prediction
from dinoseg.losses.cross_entropy import CrossEntropy


@dataclass(kw_only=True)
class StudentBatch(Batch):
    """Images with masks, followed by the strong views of those without, view by view; the masks of these are ignored.

    Args:
        labelled: the images with masks alone.
        targets: (V, B, H, W) uint8, pseudo-labels of each view after CutMix, ignored where the teacher is not sure.
        counted: (V,) float32, number of pixels that are not padding.
        facts: scalars of the pseudo-labels, by name.
    """

    labelled: Batch
    targets: Tensor
    counted: Tensor
    facts: dict[str, Tensor]


class FewMasksLoss(Loss):
    """Mean of a loss on masks and of the cross-entropy against pseudo-labels.

    The latter is the sum over the pixels with a pseudo-label, divided by all pixels that are not padding, and then the
    mean over the views.

    Args:
        criterion: the loss on masks.
        num_classes: K.
        ignore_index: id of pixels without a label.
        strong_views: V, number of strong views.
    """

    def __init__(self, criterion: Loss, num_classes: int, ignore_index: int, strong_views: int) -> None:
        super().__init__()
        self.criterion = criterion
        self.needs = criterion.needs
        self.sums_over_batch = criterion.sums_over_batch
        self.num_divisors = criterion.num_divisors + strong_views
        self.cross_entropy = CrossEntropy(torch.ones(num_classes), ignore_index, average="all")

    def forward(self, prediction: Prediction, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, and its parts: `masks`, `pseudo_labels`, and the facts of the batch."""
        if not isinstance(batch, StudentBatch):
            return self.criterion(prediction, batch)
        ours = self.criterion.divisors(batch.labelled).to(batch.counted)
        total, _, parts = self.step_loss(prediction, batch, torch.cat([ours, batch.counted]))
        return total, parts

    def divisors(self, batch: Any) -> Tensor:
        """Return the divisors of the loss on masks, and each view's pixels that are not padding."""
        values = self.criterion.divisors(batch.labelled)
        return torch.cat([values, batch.unlabelled.count_pixels().to(values)])

    def step_loss(
        self, prediction: Prediction, batch: Any, divisors: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return the batch's part of a step's loss, the loss of the batch alone, and its parts by name."""
        ours, others = divisors.split([self.criterion.num_divisors, len(batch.counted)])
        labelled = prediction.of_images(slice(0, batch.labelled.count))
        part, value, parts = self.criterion.step_loss(labelled, batch.labelled, ours)
        sums = self._sums(prediction, batch)
        alone = safe_divide(sums.detach(), batch.counted).mean()
        total = (part + safe_divide(sums, others).mean()) / 2
        parts = {**parts, "masks": value.detach(), "pseudo_labels": alone, **batch.facts}
        return total, (value.detach() + alone) / 2, parts

    def _sums(self, prediction: Prediction, batch: StudentBatch) -> Tensor:
        """Return the summed cross-entropy (V,) of each view."""
        size = batch.targets.shape[1]
        starts = range(batch.labelled.count, len(batch.names), size)
        means = [
            self.cross_entropy(prediction.of_images(slice(start, start + size)), Batch.of_masks(targets))[0]
            for start, targets in zip(starts, batch.targets, strict=True)
        ]
        return torch.stack(means) * batch.targets[0].numel()
