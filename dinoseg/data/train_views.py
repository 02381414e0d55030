"""Training views of images: each is a function of the seed, the epoch and the sample index alone."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from dinoseg.core.shapes import Sample, SegmentationData

Transform = Callable[..., tuple[np.ndarray, np.ndarray]]
"""Map an image (H, W, 3), its mask (H, W), a generator, and a class to be shown or None, to a view of both."""
ORDER, VIEW, _CLASS, CLIP = 0, 1, 2, 5  # purposes of random streams, one Philox counter word


@dataclass(frozen=True)
class ClassUniform:
    """Class-uniform sampling of a share of the samples: first a class, then one of its images, both uniformly.

    Zhu et al., arXiv 1812.01593, sample their crops in this way.

    Args:
        share: probability in (0, 1] that a sample is class-uniform.
        images: class id to the indices (N,) of the images that have pixels of that class.
        digests: hash of each image's mask; a change of mask moves crops, which invalidates cached features.
    """

    share: float
    images: Mapping[int, np.ndarray]
    digests: Sequence[str]

    def draw(self, rng: np.random.Generator) -> tuple[int, int] | None:
        """Return an image index and the class to show, or None if this sample is not class-uniform."""
        if rng.random() >= self.share:
            return None
        shown = list(self.images)[rng.integers(len(self.images))]
        return int(rng.choice(self.images[shown])), shown


class Draw(NamedTuple):
    """Sampled view of one sample in one epoch."""

    number: int  # of the view
    image: int
    shown: tuple[int, ...]  # class that the view must show; empty: the crop's position is unconstrained
    rng: np.random.Generator


@dataclass(frozen=True)
class TrainViews:
    """Training views of a dataset's images.

    Args:
        data: images and masks; an epoch has one sample per image.
        augment: samples a view of an image and its mask.
        seed: determines the views, together with epoch and sample.
        views: number of fixed views per sample, used in turn; None: new views in each epoch.
        uniform: class-uniform sampling; None: each sample is the image of its own index.
    """

    data: SegmentationData
    augment: Transform
    seed: int
    views: int | None = None
    uniform: ClassUniform | None = None

    def draw(self, epoch: int, sample: int) -> Draw:
        """Return the image, class and random generator of a sample in an epoch."""
        number = epoch if self.views is None else epoch % self.views
        drawn = self.uniform and self.uniform.draw(make_rng(self.seed, number, sample, _CLASS))
        image, *shown = drawn or (sample,)
        return Draw(number, image, tuple(shown), make_rng(self.seed, number, sample, VIEW))

    def read(self, epoch: int, sample: int) -> Sample:
        """Return the view of a sample in an epoch."""
        return self.view_of(self.draw(epoch, sample))

    def view_of(self, draw: Draw) -> Sample:
        """Return the augmented view that `draw` describes."""
        sample = self.data[draw.image]
        pixels = np.ascontiguousarray(sample["image"].permute(1, 2, 0).numpy())  # (H, W, 3)
        image, mask = self.augment(pixels, sample["mask"].numpy(), draw.rng, *draw.shown)
        return Sample(image=torch.from_numpy(image).permute(2, 0, 1), mask=torch.from_numpy(mask), name=sample["name"])


def make_rng(seed: int, epoch: int, sample: int, purpose: int) -> np.random.Generator:
    """Return the random generator of a sample in an epoch for one purpose."""
    # Philox has an independent stream per key and counter; sampling advances only the lowest counter word
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, sample, epoch, purpose]))
