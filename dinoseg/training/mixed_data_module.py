"""Batches of images with masks paired with batches of images without; each order depends only on the seed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from dinoseg.core.shapes import Batch, Prediction
from dinoseg.data.loader import sample_batches
from dinoseg.data.train_views import UNLABELLED, make_rng
from dinoseg.data.unlabelled import UnlabelledImages, UnlabelledViews
from dinoseg.training.engine import Engine
from dinoseg.training.image_data_module import ImageDataModule
from dinoseg.training.self_training_batch import MixedBatch, SelfTrainingBatch
from dinoseg.training.tally import Tally
from dinoseg.utils.errors import UserError
from dinoseg.utils.ranges import Count, Few, LowShare, NotNegative, Positive
from dinoseg.utils.wording import count_of


@dataclass(frozen=True)
class Unlabelled:
    """Images without masks to train on, and their number per batch.

    Args:
        images: folder, pattern or video of them, used in addition to training images whose masks are not used.
        every: seconds between two frames of a video.
        batch_size: images in a batch, over all ranks; None: the number of images with masks.
    """

    images: str | None = None
    every: Positive = 1.0
    batch_size: Count | None = None

    def size(self, labelled: int, there: int, world_size: int) -> int:
        """Return the images without masks in a batch that has `labelled` images with masks.

        Raises:
            UserError: the batch is larger than the number of images, or is not a multiple of the number of ranks.
        """
        size = self.batch_size or labelled
        if size > there or size % world_size:
            raise UserError(
                f"trainer.unlabelled_batch_size={size} with {count_of(there, 'image')} without masks: give a number of "
                f"at most that, a multiple of {count_of(world_size, 'device')}, or more images."
            )
        return size


@dataclass(frozen=True)
class SelfTraining(Unlabelled):
    """Options of self-training on images without masks, labelled by a moving average of the weights.

    Args:
        images: see `Unlabelled`.
        every: see `Unlabelled`.
        batch_size: see `Unlabelled`.
        weight: weight of their loss.
        threshold: minimum probability of a class for a teacher's label to be used.
        views: strong views of each image.
    """

    weight: NotNegative = 1.0
    threshold: LowShare = 0.95
    views: Few = 2


@dataclass(kw_only=True)
class MixedDataModule(ImageDataModule):
    """Batches of images with and without masks, for a student that is also trained on a teacher's labels.

    Args:
        unlabelled: images without masks.
        options: options of self-training.
    """

    unlabelled: UnlabelledImages
    options: SelfTraining

    def __post_init__(self) -> None:
        """Refuse batch sizes that do not fit, long before the first batch."""
        super().__post_init__()
        self._size = self.options.size(self.batch_size, len(self.unlabelled), self.world_size)

    def train_batches(self, start: int) -> Iterator[MixedBatch]:
        """Yield this rank's share of every pair of batches from number `start` on, without end."""
        read = partial(_read, self.unlabelled, self.seed)
        order = {
            "batch_size": self._size,
            "seed": self.seed,
            "start": start,
            "rank": self.rank,
            "world_size": self.world_size,
        }
        views = sample_batches(read, _stacked, len(self.unlabelled), workers=self.workers, **order)
        labelled: Iterator[Any] = super().train_batches(start)  # of images: features are not cached
        return map(self._mixed, labelled, views)

    def tally(self, engine: Engine) -> Tally:
        """Return a tally of how well a step predicts its images with masks."""
        return _TallyOfMasks(self.train, engine)

    def _mixed(self, labelled: Batch, views: UnlabelledViews) -> MixedBatch:
        threshold, ignored = self.options.threshold, self.train.ignore_index
        return MixedBatch(**vars(labelled), **views._asdict(), threshold=threshold, ignore_index=ignored)


class _TallyOfMasks(Tally):
    def add(self, prediction: Prediction, batch: Batch) -> None:
        """Count the images that have masks of their own."""
        if isinstance(batch, SelfTrainingBatch):
            prediction, batch = prediction.of_images(slice(0, len(batch.names))), batch.labelled
        super().add(prediction, batch)


def _read(images: UnlabelledImages, seed: int, epoch: int, index: int) -> UnlabelledViews:
    return images.read(index, make_rng(seed, epoch, index, UNLABELLED))


def _stacked(views: Sequence[UnlabelledViews]) -> UnlabelledViews:
    return UnlabelledViews(*map(torch.stack, zip(*views, strict=True)))
