"""What a training sees of its images: each view a function of the seed, the epoch and the sample's number alone."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from dinoseg.core.shapes import Sample, SegmentationData

Transform = Callable[..., tuple[np.ndarray, np.ndarray]]
"""From image (H, W, 3), mask (H, W) and chance, and a class to be shown where one is asked for, to a view of both."""
ORDER, VIEW, _CLASS, _MIX, UNLABELLED = 0, 1, 2, 3, 4  # what chance is drawn for


@dataclass(frozen=True)
class ClassUniform:
    """A share of the samples shows a class, drawn evenly among those that occur, then an image evenly among its own.

    Class-uniform sampling, as Zhu et al., arXiv 1812.01593, draw their crops.

    Args:
        share: of the samples, in (0, 1]: the probability of each.
        images: numbers (N,) of those that have pixels of a class, by the class's id.
        digests: of each image's mask, by which kept features know that a crop lies where it lay.
    """

    share: float
    images: Mapping[int, np.ndarray]
    digests: Sequence[str]

    def draw(self, chance: np.random.Generator) -> tuple[int, int] | None:
        """Return an image and the class that is to be seen of it; None: this sample is drawn for no class."""
        if chance.random() >= self.share:
            return None
        shown = list(self.images)[chance.integers(len(self.images))]
        return int(chance.choice(self.images[shown])), shown


class Draw(NamedTuple):
    """What a sample is in an epoch."""

    number: int  # of its view
    image: int
    shown: tuple[int, ...]  # the class of which the view shows a pixel; none: it lies wherever chance lays it
    chance: np.random.Generator


@dataclass(frozen=True)
class TrainViews:
    """The views of images that a training sees.

    Args:
        data: images and masks; there are as many samples in an epoch.
        augment: draws a view of both.
        seed: decides them, with epoch and sample.
        views: of each sample, drawn in turn; None: new ones in each epoch.
        uniform: which samples are drawn for a class; None: none, each is the image of its number.
        mix: share of the samples that classes of another one are pasted on, anew in each epoch.
    """

    data: SegmentationData
    augment: Transform
    seed: int
    views: int | None = None
    uniform: ClassUniform | None = None
    mix: float = 0.0

    def draw(self, epoch: int, sample: int) -> Draw:
        """Return what a sample is in an epoch."""
        number = epoch if self.views is None else epoch % self.views
        drawn = self.uniform and self.uniform.draw(chance_of(self.seed, number, sample, _CLASS))
        image, *shown = drawn or (sample,)
        return Draw(number, image, tuple(shown), chance_of(self.seed, number, sample, VIEW))

    def read(self, epoch: int, sample: int) -> Sample:
        """Return the view of an image that a sample is in an epoch, with classes of another's where it is mixed."""
        view, chance = self.seen(self.draw(epoch, sample)), chance_of(self.seed, epoch, sample, _MIX)
        if chance.random() >= self.mix:
            return view
        other = int(chance.integers(len(self.data) - 1))
        other += other >= sample
        return class_mixed(self.seen(self.draw(epoch, other)), view, self.data.ignore_index, chance)

    def seen(self, draw: Draw) -> Sample:
        """Return a view as it was drawn."""
        sample = self.data[draw.image]
        pixels = np.ascontiguousarray(sample["image"].permute(1, 2, 0).numpy())  # (H, W, 3)
        image, mask = self.augment(pixels, sample["mask"].numpy(), draw.chance, *draw.shown)
        return Sample(image=torch.from_numpy(image).permute(2, 0, 1), mask=torch.from_numpy(mask), name=sample["name"])


def chance_of(seed: int, epoch: int, sample: int, purpose: int) -> np.random.Generator:
    """Return the chance that something of a sample in an epoch is drawn with."""
    # Philox has an independent stream for every key and counter; drawing moves only the lowest counter word
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, sample, epoch, purpose]))


def class_mixed(source: Sample, onto: Sample, ignore_index: int, chance: np.random.Generator) -> Sample:
    """Return a view with half of the classes of another of its size pasted on it, pixels and ids.

    ClassMix (Olsson et al., arXiv 2007.07936, section 3.1), of true masks: half is rounded up, and ignored pixels are
    of no class, so they stay where they are and cover nothing.
    """
    present = source["mask"].unique().numpy()
    present = present[present != ignore_index]
    chosen = torch.from_numpy(chance.choice(present, -(-len(present) // 2), replace=False))
    pasted = torch.isin(source["mask"], chosen)
    return Sample(
        image=torch.where(pasted, source["image"], onto["image"]),
        mask=torch.where(pasted, source["mask"], onto["mask"]),
        name=f"{onto['name']} with classes of {source['name']}",
    )
