"""Training views of images: each is a function of the seed, the epoch and the sample index alone."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from dinoseg.core.shapes import Sample, SegmentationData

Transform = Callable[..., tuple[np.ndarray, np.ndarray]]
"""Map an image (H, W, 3), its mask (H, W) and a generator to a view of both."""
ORDER, VIEW, CLIP = 0, 1, 5  # purposes of random streams, one Philox counter word


@dataclass(frozen=True)
class TrainViews:
    """Training views of a dataset's images.

    Args:
        data: images and masks; an epoch has one sample per image.
        augment: samples a view of an image and its mask.
        seed: determines the views, together with epoch and sample.
        views: number of fixed views per sample, used in turn; None: new views in each epoch.
    """

    data: SegmentationData
    augment: Transform
    seed: int
    views: int | None = None

    def view_number(self, epoch: int) -> int:
        """Return the number of the view that each sample shows in an epoch."""
        return epoch if self.views is None else epoch % self.views

    def make_rng(self, epoch: int, sample: int) -> np.random.Generator:
        """Return the random generator of a sample's view in an epoch."""
        return make_rng(self.seed, self.view_number(epoch), sample, VIEW)

    def read(self, epoch: int, sample: int) -> Sample:
        """Return the view of a sample in an epoch."""
        whole = self.data[sample]
        pixels = np.ascontiguousarray(whole["image"].permute(1, 2, 0).numpy())  # (H, W, 3)
        image, mask = self.augment(pixels, whole["mask"].numpy(), self.make_rng(epoch, sample))
        return Sample(image=torch.from_numpy(image).permute(2, 0, 1), mask=torch.from_numpy(mask), name=whole["name"])


def make_rng(seed: int, epoch: int, sample: int, purpose: int) -> np.random.Generator:
    """Return the random generator of a sample in an epoch for one purpose."""
    # Philox has an independent stream per key and counter; sampling advances only the lowest counter word
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, sample, epoch, purpose]))
