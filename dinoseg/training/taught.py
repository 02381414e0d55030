"""A batch of images with masks and of views of images without, whose labels are what a teacher is sure of."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dinoseg.core.contracts import Loss, share_of
from dinoseg.core.shapes import Batch, Prediction, Teach
from dinoseg.losses.pixel_mean import PixelDivisor
from dinoseg.utils.ranges import NotNegative
from dinoseg.utils.transfer import sent

_VIEWS = ("weak", "outside", "strong", "boxes")  # of images without masks


@dataclass
class MixedBatch(Batch):
    """Images with masks (B), and U images without, of which a teacher sees a weak view and a student V strong ones."""

    weak: Tensor  # (U, 3, H, W) uint8
    outside: Tensor  # (U, H, W) uint8, `ignore_index` beyond the image's border
    strong: Tensor  # (U, V, 3, H, W) uint8
    boxes: Tensor  # (U, V, 4) int64: top, left, bottom, right of what comes from the image before; empty: nothing
    threshold: float  # least probability of a teacher's class that is learnt
    ignore_index: int

    @property
    def count(self) -> int:
        """The number of images that a student sees."""
        return len(self.names) + self.boxes.shape[:2].numel()

    def to(self, device: torch.device) -> MixedBatch:
        """Copy to `device`."""
        there: dict[str, Any] = {
            name: sent(value, device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **there)

    def split(self, parts: int) -> list[Batch]:
        """Return so many batches of the images in their order; boxes then come from images of the same part."""
        views = zip(*(getattr(self, name).tensor_split(parts) for name in _VIEWS), strict=True)
        return [
            replace(self, **vars(labelled), **dict(zip(_VIEWS, part, strict=True)))
            for labelled, part in zip(super().split(parts), views, strict=True)
        ]

    def taught(self, teach: Teach) -> Batch:
        """Return all that the student sees in one batch, the strong views with what `teach` is sure of the weak ones.

        Ignored are pixels of less than `threshold` and those beyond an image's border; boxes bring their labels.
        """
        if not len(self.weak):
            return Batch(self.image, self.mask, self.names)
        with torch.no_grad():
            shares = teach(self.weak).logits((self.weak.shape[-2], self.weak.shape[-1])).float().softmax(dim=1)
            sure, ids = shares.max(dim=1)
        outside = self.outside == self.ignore_index
        ids = ids.to(torch.uint8).masked_fill((sure < self.threshold) | outside, self.ignore_index)
        images = torch.where(self._cut[:, :, None], self.strong.roll(1, 0), self.strong)
        masks = self._pasted(ids)
        whole = torch.cat([self.image, images.flatten(0, 1)]), torch.cat([self.mask, masks.flatten(0, 1)])
        return TaughtBatch(*whole, self.names, self.inside, self.ignore_index)

    @property
    def inside(self) -> Tensor:
        """The number () of pixels of the strong views that show an image."""
        return (~self._pasted(self.outside == self.ignore_index)).sum()

    @property
    def _cut(self) -> Tensor:
        """Which pixels (U, V, H, W) of the strong views come from the image before."""
        return _within(self.boxes, self.outside.shape[-2], self.outside.shape[-1])

    def _pasted(self, maps: Tensor) -> Tensor:
        """Return maps (U, H, W) of the weak views as maps (U, V, H, W) of the strong ones."""
        return torch.where(self._cut, maps.roll(1, 0)[:, None], maps[:, None])


@dataclass
class TaughtBatch(Batch):
    """Images with masks, `names` of these alone, and behind them views with a teacher's labels."""

    inside: Tensor  # (), pixels of the views that show an image
    ignore_index: int

    @property
    def count(self) -> int:
        """The number of images."""
        return len(self.image)

    @property
    def labelled(self) -> Batch:
        """The images with masks."""
        return Batch(self.image[: len(self.names)], self.mask[: len(self.names)], self.names)

    @property
    def views(self) -> Batch:
        """The views with a teacher's labels, which have no names."""
        own = self.image[len(self.names) :], self.mask[len(self.names) :]
        return Batch(*own, [""] * len(own[0]))


class TaughtLoss(Loss):
    """A loss of images with masks, and, times `weight`, of views with a teacher's labels.

    The latter is a mean over all pixels of the views, of which those that the teacher is not sure of cost nothing
    (FixMatch, arXiv 2001.07685): what is learnt from them grows with how sure it is.

    Args:
        criterion: of images with masks.
        of_views: that of views: for it all classes should weigh alike. A teacher that learnt with weights gives rare
            classes more pixels than they have; weighted once more, its student would give them more yet, and so on.
        weight: of the views.
    """

    def __init__(self, criterion: Loss, of_views: Loss, weight: NotNegative) -> None:
        super().__init__()
        self.criterion, self.of_views, self.weight = criterion, of_views, weight
        self.needs_masks = criterion.needs_masks
        self.num_divisors, self.divisor = criterion.num_divisors + (1 if weight else 0), criterion.divisor
        # another mean times the share of sure pixels is no sum over pixels
        plain = isinstance(of_views.divisor, PixelDivisor) and of_views.divisor.border is None
        self.sums_over_batch = criterion.sums_over_batch or (weight > 0 and not plain)

    def forward(self, prediction: Prediction, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the sum; parts are those of the images with masks, `unlabelled`, and `sure`: the share of pixels."""
        if not isinstance(batch, TaughtBatch):
            return self.criterion(prediction, batch)
        value, parts = self.criterion(prediction.of_images(slice(0, len(batch.names))), batch.labelled)
        taught, more = self._of_views(prediction, batch)
        return value + self.weight * taught, parts | more

    def divisors(self, batch: Any) -> Tensor:
        """Return the divisors of the loss of masks, and the pixels of the views that show an image."""
        own = self.criterion.divisors(batch)
        return torch.cat([own, batch.inside.to(own)[None]]) if self.weight else own

    def in_step(self, prediction: Prediction, batch: Any, divisors: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return the part of a batch in the loss of a step, the loss of the batch alone, and its parts by name."""
        own = self.criterion.num_divisors
        if not isinstance(batch, TaughtBatch):
            return self.criterion.in_step(prediction, batch, divisors[:own])
        labelled = prediction.of_images(slice(0, len(batch.names)))
        part, value, parts = self.criterion.in_step(labelled, batch.labelled, divisors[:own])
        taught, more = self._of_views(prediction, batch)
        share = share_of(batch.inside.to(divisors), divisors[own:].sum())
        return part + self.weight * share * taught, value + self.weight * taught.detach(), parts | more

    def _of_views(self, prediction: Prediction, batch: TaughtBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of the views, and it and the share of pixels that the teacher is sure of as parts."""
        views = batch.views
        taught, _ = self.of_views(prediction.of_images(slice(len(batch.names), None)), views)
        sure = (views.mask != batch.ignore_index).sum() / batch.inside.clamp(min=1)
        taught = taught * sure
        return taught, {"unlabelled": taught.detach(), "sure": sure}


def _within(boxes: Tensor, height: int, width: int) -> Tensor:
    """Return which pixels (U, V, H, W) lie in boxes (U, V, 4)."""
    top, left, bottom, right = boxes[..., None, None].unbind(dim=2)
    rows, columns = torch.arange(height, device=boxes.device)[:, None], torch.arange(width, device=boxes.device)
    return (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
