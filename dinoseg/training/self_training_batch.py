"""Batches for self-training: images with masks, and views of images without, labelled by a confident teacher."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dinoseg.core.contracts import Loss, safe_divide
from dinoseg.core.shapes import Batch, LabelPredictor, Prediction
from dinoseg.losses.pixel_mean import ALL_PIXELS, PixelDivisor, PixelMean
from dinoseg.utils.errors import UserError
from dinoseg.utils.ranges import NotNegative
from dinoseg.utils.transfer import to_device

_VIEWS = ("weak", "outside", "strong", "boxes")  # fields with views of images without masks


@dataclass
class MixedBatch(Batch):
    """B images with masks, and U images without: a weak view of each for a teacher, V strong ones for a student."""

    weak: Tensor  # (U, 3, H, W) uint8
    outside: Tensor  # (U, H, W) uint8, `ignore_index` beyond the image's border
    strong: Tensor  # (U, V, 3, H, W) uint8
    boxes: Tensor  # (U, V, 4) int64: top, left, bottom, right of the part from the previous image; may be empty
    threshold: float  # minimum probability of a teacher's class to become a label
    ignore_index: int

    @property
    def count(self) -> int:
        """Return the number of images that the student sees."""
        return len(self.names) + self.boxes.shape[:2].numel()

    def to(self, device: torch.device) -> MixedBatch:
        """Copy to `device`."""
        there: dict[str, Any] = {
            name: to_device(value, device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **there)

    def split(self, parts: int) -> list[Batch]:
        """Split the images in their order into `parts` batches; boxes then come from images of the same part."""
        views = zip(*(getattr(self, name).tensor_split(parts) for name in _VIEWS), strict=True)
        return [
            replace(self, **vars(labelled), **dict(zip(_VIEWS, part, strict=True)))
            for labelled, part in zip(super().split(parts), views, strict=True)
        ]

    def with_labels(self, predict: LabelPredictor) -> Batch:
        """Return all images of the student in one batch, with labels of the strong views predicted from the weak ones.

        Pixels below `threshold` and those beyond an image's border are ignored; pasted boxes keep their own labels.
        """
        if not len(self.weak):
            return Batch(self.image, self.mask, self.names)
        with torch.no_grad():
            shares = predict(self.weak).logits((self.weak.shape[-2], self.weak.shape[-1])).float().softmax(dim=1)
            sure, ids = shares.max(dim=1)
        outside = self.outside == self.ignore_index
        ids = ids.to(torch.uint8).masked_fill((sure < self.threshold) | outside, self.ignore_index)
        images = torch.where(self._cut[:, :, None], self.strong.roll(1, 0), self.strong)
        masks = self._pasted(ids)
        whole = torch.cat([self.image, images.flatten(0, 1)]), torch.cat([self.mask, masks.flatten(0, 1)])
        return SelfTrainingBatch(*whole, self.names, self.inside, self.ignore_index)

    @property
    def inside(self) -> Tensor:
        """Return the number () of pixels of the strong views that show an image."""
        return (~self._pasted(self.outside == self.ignore_index)).sum()

    @property
    def _cut(self) -> Tensor:
        """Return which pixels (U, V, H, W) of the strong views come from the previous image."""
        return _within(self.boxes, self.outside.shape[-2], self.outside.shape[-1])

    def _pasted(self, maps: Tensor) -> Tensor:
        """Paste maps (U, H, W) of the weak views like the strong ones, into maps (U, V, H, W)."""
        return torch.where(self._cut, maps.roll(1, 0)[:, None], maps[:, None])


@dataclass
class SelfTrainingBatch(Batch):
    """Images with masks, followed by views with a teacher's labels; `names` are those of the images with masks."""

    inside: Tensor  # (), pixels of the views that show an image
    ignore_index: int

    @property
    def count(self) -> int:
        """Return the number of images."""
        return len(self.image)

    @property
    def labelled(self) -> Batch:
        """Return the images with masks."""
        return Batch(self.image[: len(self.names)], self.mask[: len(self.names)], self.names)

    @property
    def views(self) -> Batch:
        """Return the views with a teacher's labels, which have no names."""
        tensors = self.image[len(self.names) :], self.mask[len(self.names) :]
        return Batch(*tensors, [""] * len(tensors[0]))


class SelfTrainingLoss(Loss):
    """Sum of a loss on images with masks and `weight` times a loss on views with a teacher's labels.

    The latter is a mean over all pixels of the views; uncertain pixels contribute 0 (FixMatch, arXiv 2001.07685).
    Its size thus grows with the share of pixels that have a teacher's label.

    Args:
        criterion: loss on images with masks.
        of_views: loss on views, in which all classes should have the same weight. A teacher trained with class
            weights predicts rare classes too often. Class weights here would amplify that in the student.
        weight: weight of the views.

    Raises:
        UserError: some terms of `of_views` average over all pixels, and others have another divisor.
    """

    def __init__(self, criterion: Loss, of_views: Loss, weight: NotNegative) -> None:
        super().__init__()
        over_all = [part for part in of_views.modules() if isinstance(part, PixelMean) and part.average == "all"]
        if weight and over_all and of_views.divisor != ALL_PIXELS:
            raise UserError(
                "trainer=self_training averages each term over all pixels of the views; average=all would divide one "
                "term of the loss twice. Set average=labelled in loss.criterion.terms."
            )
        self.criterion, self.of_views, self.weight = criterion, of_views, weight
        self.needs_masks = criterion.needs_masks
        self.num_divisors, self.divisor = criterion.num_divisors + (1 if weight else 0), criterion.divisor
        # other means, times the share of certain pixels, are not sums over pixels
        plain = isinstance(of_views.divisor, PixelDivisor) and of_views.divisor.border is None
        self._averages_all = of_views.divisor == ALL_PIXELS
        self.sums_over_batch = criterion.sums_over_batch or (weight > 0 and not plain and not self._averages_all)

    def forward(self, prediction: Prediction, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss; its parts are those of the images with masks, `unlabelled` and `sure` (share of pixels)."""
        if not isinstance(batch, SelfTrainingBatch):
            return self.criterion(prediction, batch)
        value, parts = self.criterion(prediction.of_images(slice(0, len(batch.names))), batch.labelled)
        unlabelled, more = self._of_views(prediction, batch)
        return value + self.weight * unlabelled, parts | more

    def divisors(self, batch: Any) -> Tensor:
        """Return the divisors of the loss on masks, and the number of pixels of the views that show an image."""
        values = self.criterion.divisors(batch)
        return torch.cat([values, batch.inside.to(values)[None]]) if self.weight else values

    def step_loss(
        self, prediction: Prediction, batch: Any, divisors: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return the batch's part of a step's loss, the loss of the batch alone, and its parts by name."""
        num_divisors = self.criterion.num_divisors
        if not isinstance(batch, SelfTrainingBatch):
            return self.criterion.step_loss(prediction, batch, divisors[:num_divisors])
        labelled = prediction.of_images(slice(0, len(batch.names)))
        part, value, parts = self.criterion.step_loss(labelled, batch.labelled, divisors[:num_divisors])
        unlabelled, more = self._of_views(prediction, batch)
        share = safe_divide(batch.inside.to(divisors), divisors[num_divisors:].sum())
        return part + self.weight * share * unlabelled, value + self.weight * unlabelled.detach(), parts | more

    def _of_views(self, prediction: Prediction, batch: SelfTrainingBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss on the views; its parts are itself and the share of pixels the teacher is certain of."""
        views = batch.views
        unlabelled, parts = self.of_views(prediction.of_images(slice(len(batch.names), None)), views)
        inside = batch.inside.clamp(min=1)
        sure = (views.mask != batch.ignore_index).sum() / inside
        unlabelled = unlabelled * (parts["weight"] / inside if self._averages_all else sure)
        return unlabelled, {"unlabelled": unlabelled.detach(), "sure": sure}


def _within(boxes: Tensor, height: int, width: int) -> Tensor:
    """Return which pixels (U, V, H, W) lie in boxes (U, V, 4)."""
    top, left, bottom, right = boxes[..., None, None].unbind(dim=2)
    rows, columns = torch.arange(height, device=boxes.device)[:, None], torch.arange(width, device=boxes.device)
    return (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
