"""Views of images without masks: a weak one for the teacher, and strong ones of the same crop for the student."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dinoseg.core.shapes import StackedSamples
from dinoseg.data.loader import TrainViews, make_rng
from dinoseg.data.pairs.dataset import PairDataset
from dinoseg.data.transforms import Augment
from dinoseg.extensions.few_masks.strong import draw_box, draw_strong_view
from dinoseg.utils.errors import UserError

_STRONG = 6  # purpose of random streams, see `dinoseg.data.loader`


@dataclass
class UnlabelledBatch(StackedSamples):
    """Views of images without masks, of one size."""

    weak: Tensor  # (B, C, H, W) uint8
    strong: Tensor  # (B, V, C, H, W) uint8, V views of each image, before CutMix
    boxes: Tensor  # (B, V, 4) int64: top, left, bottom and right of the CutMix boxes
    padding: Tensor  # (B, H, W) bool, True = outside the image
    truth: Tensor  # (B, H, W) uint8, the masks that a study knows; all ignored for other images
    names: list[str]

    def mix(self, values: Tensor, view: int) -> Tensor:
        """Return values (B, ..., H, W) with those of image B - 1 - i inside the box of image i in a view (CutMix)."""
        height, width = values.shape[-2:]
        rows = torch.arange(height, device=values.device)[:, None]
        columns = torch.arange(width, device=values.device)
        top, left, bottom, right = self.boxes[:, view, :, None, None].unbind(1)
        inside = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)  # (B, H, W)
        return torch.where(inside.unsqueeze(1) if values.ndim > 3 else inside, values.flip(0), values)

    def count_pixels(self) -> Tensor:
        """Return the number of pixels (V,) float32 of each view that are not padding, after CutMix."""
        views = range(self.strong.shape[1])
        return torch.stack([(~self.mix(self.padding, view)).sum() for view in views]).float()


@dataclass(frozen=True)
class UnlabelledViews:
    """Views of the images without masks of a training.

    Args:
        drawn: the images and their weak views.
        augment: the transform of `drawn`.
        views: number of strong views of an image.
        reference: a dataset with masks of some of the images, for a study; they are only compared.
        rows: indices of these masks in `reference`, by image.
    """

    drawn: TrainViews
    augment: Augment
    views: int
    reference: PairDataset | None
    rows: Mapping[int, int]

    def read(self, epoch: int, sample: int) -> UnlabelledBatch:
        """Return the views of an image in an epoch, as a batch of one."""
        whole = self.drawn.data[sample]
        pixels = np.ascontiguousarray(whole["image"].permute(1, 2, 0).numpy())  # (H, W, C)
        blank = np.zeros(pixels.shape[:2], np.uint8)
        weak, outside = self.augment(pixels, blank, self.drawn.make_rng(epoch, sample))
        size = (weak.shape[0], weak.shape[1])
        truth = np.full(size, self.augment.ignore_index, np.uint8)
        if sample in self.rows and self.reference is not None:
            # a mask that nobody trains on may be unfinished
            with suppress(UserError):
                mask = self.reference.mask(self.rows[sample])
                truth = self.augment.mask(mask, self.drawn.make_rng(epoch, sample))
        seed = self.drawn.seed
        streams = [make_rng(seed, epoch, sample, _STRONG, view) for view in range(self.views)]
        strong = np.stack([draw_strong_view(weak, rng) for rng in streams])
        boxes = torch.tensor([draw_box(size, rng) for rng in streams])
        return UnlabelledBatch(
            weak=torch.from_numpy(weak).permute(2, 0, 1)[None],
            strong=torch.from_numpy(strong).permute(0, 3, 1, 2)[None],
            boxes=boxes[None],
            padding=torch.from_numpy(outside != 0)[None],
            truth=torch.from_numpy(truth)[None],
            names=[whole["name"]],
        )


def join_views(samples: Sequence[UnlabelledBatch]) -> UnlabelledBatch:
    """Concatenate views of one size."""
    names = [name for sample in samples for name in sample.names]
    tensors = {
        key: torch.cat([getattr(sample, key) for sample in samples])
        for key in ("weak", "strong", "boxes", "padding", "truth")
    }
    return UnlabelledBatch(**tensors, names=names)
