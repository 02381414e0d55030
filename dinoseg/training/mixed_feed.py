"""Batches of images with masks beside batches of images without: two orders, each a function of the seed alone."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from dinoseg.core.shapes import Batch, Prediction
from dinoseg.data.loader import drawn_batches
from dinoseg.data.train_views import UNLABELLED, chance_of
from dinoseg.data.unlabelled import UnlabelledImages, Views
from dinoseg.training.engine import Engine
from dinoseg.training.image_feed import ImageFeed
from dinoseg.training.tally import Tally
from dinoseg.training.taught import MixedBatch, TaughtBatch
from dinoseg.utils.errors import UserError
from dinoseg.utils.ranges import Count, Few, LowShare, NotNegative, Positive
from dinoseg.utils.wording import count_of

WHICH = {  # keys of a trainer, by what `Unlabelled` calls them
    **{"unlabelled": "images", "unlabelled_every": "every", "unlabelled_batch_size": "batch_size"}
}
KEYS = {  # the same of `SelfTraining`
    **WHICH,
    **{"unlabelled_weight": "weight", "threshold": "threshold", "strong_views": "views"},
}


@dataclass(frozen=True)
class Unlabelled:
    """Which images without masks are learnt from, and how many at once.

    Args:
        images: folder, pattern or video of them, beside the training images whose masks are not used.
        every: seconds between two frames of a video.
        batch_size: images of a batch, over all ranks; None: as many as with masks.
    """

    images: str | None = None
    every: Positive = 1.0
    batch_size: Count | None = None

    def size(self, labelled: int, there: int, world: int) -> int:
        """Return the images without masks of a batch, beside so many with masks.

        Raises:
            UserError: there are too few of them, or the ranks cannot share them.
        """
        size = self.batch_size or labelled
        if size > there or size % world:
            raise UserError(
                f"trainer.unlabelled_batch_size={size} with {count_of(there, 'image')} without masks: give a number of "
                f"at most that, a multiple of {count_of(world, 'device')}, or more images."
            )
        return size


@dataclass(frozen=True)
class SelfTraining(Unlabelled):
    """How images without masks are learnt from by what a moving average says of them.

    Args:
        images: see `Unlabelled`.
        every: likewise.
        batch_size: likewise.
        weight: of their loss.
        threshold: least probability of a class that a teacher's label is learnt with.
        views: strong ones of each image.
    """

    weight: NotNegative = 1.0
    threshold: LowShare = 0.95
    views: Few = 2


@dataclass(kw_only=True)
class MixedFeed(ImageFeed):
    """Batches for a student that learns from a teacher beside its masks.

    Args:
        unlabelled: images without masks.
        options: how they are learnt from.
    """

    unlabelled: UnlabelledImages
    options: SelfTraining

    def __post_init__(self) -> None:
        """Refuse batch sizes that do not fit, long before the first batch."""
        super().__post_init__()
        self._size = self.options.size(self.batch_size, len(self.unlabelled), self.world)

    def train_batches(self, start: int) -> Iterator[MixedBatch]:
        """Yield this rank's share of every pair of batches from number `start` on, without end."""
        read = partial(_read, self.unlabelled, self.seed)
        order = {"batch_size": self._size, "seed": self.seed, "start": start, "rank": self.rank, "world": self.world}
        views = drawn_batches(read, _stacked, len(self.unlabelled), workers=self.workers, **order)
        labelled: Iterator[Any] = super().train_batches(start)  # of images: no features are kept
        return map(self._mixed, labelled, views)

    def tally(self, engine: Engine) -> Tally:
        """Return what counts how well a step predicts its images with masks."""
        return _TallyOfMasks(self.train, engine)

    def _mixed(self, labelled: Batch, views: Views) -> MixedBatch:
        threshold, ignored = self.options.threshold, self.train.ignore_index
        return MixedBatch(**vars(labelled), **views._asdict(), threshold=threshold, ignore_index=ignored)


class _TallyOfMasks(Tally):
    def add(self, prediction: Prediction, batch: Batch) -> None:
        """Count what has masks of its own."""
        if isinstance(batch, TaughtBatch):
            prediction, batch = prediction.of_images(slice(0, len(batch.names))), batch.labelled
        super().add(prediction, batch)


def _read(images: UnlabelledImages, seed: int, epoch: int, index: int) -> Views:
    return images.read(index, chance_of(seed, epoch, index, UNLABELLED))


def _stacked(views: Sequence[Views]) -> Views:
    return Views(*map(torch.stack, zip(*views, strict=True)))
