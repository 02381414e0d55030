"""Where batches come from: one data set to train on, one to validate on."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from dinoseg.data.loader import check_batch_size, eval_samples, stack_equal, train_batches
from dinoseg.shapes import Batch, SegmentationData


@dataclass
class Feed:
    """Batches for one rank.

    Args:
        train: data set to draw from.
        val: data set to score on.
        augment: joint transform of a training image and its mask.
        batch_size: images in a batch, over all ranks.
        seed: decides order and augmentation, with epoch and sample.
        workers: loading processes.
        rank: this rank.
        world: number of ranks.
    """

    train: SegmentationData
    val: SegmentationData
    augment: Callable
    batch_size: int
    seed: int
    workers: int
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        """Refuse a batch size that does not fit, long before the first batch."""
        check_batch_size(self.batch_size, len(self.train), self.world)

    def train_batches(self, start: int) -> Iterator[Batch]:
        """Yield this rank's share of every batch from number `start` on, without end."""
        return train_batches(
            self.train,
            self.augment,
            batch_size=self.batch_size,
            seed=self.seed,
            start=start,
            workers=self.workers,
            rank=self.rank,
            world=self.world,
        )


def eval_batches(data: SegmentationData, *, batch_size: int, workers: int, rank: int, world: int) -> Iterator[Batch]:
    """Yield a rank's share of a data set once, in order, in batches of one size."""
    return stack_equal(eval_samples(data, workers=workers, rank=rank, world=world), batch_size)
