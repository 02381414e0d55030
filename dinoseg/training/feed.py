"""Where batches come from, and how what they trained is validated: one data set to train on, one to validate on."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
from torch import Tensor, nn

from dinoseg.data.loader import check_batch_size, train_batches
from dinoseg.metrics.confusion import ConfusionMatrix
from dinoseg.model import Segmenter
from dinoseg.ranges import Count
from dinoseg.report.overlay import compare
from dinoseg.shapes import Batch, SegmentationData
from dinoseg.training.engine import Engine
from dinoseg.training.evaluate import evaluate


class Validation(NamedTuple):
    """The scores of a validation, and a picture of it."""

    scores: dict[str, Any]  # numbers, None where undefined; others are left out of the log
    picture: np.ndarray | None  # (H, W, 3) uint8


class Source(Protocol):
    """What `fit` trains from."""

    seed: int
    score_names: Sequence[str]  # of a validation that may decide which checkpoint is best
    lowest: Sequence[str]  # of these, where the lowest value is the best

    def train_batches(self, start: int) -> Iterator[Any]:
        """Yield this rank's share of every batch from number `start` on, without end.

        A batch has `image`, what the model takes; `names`, of its samples; and `to(device)`.
        """
        ...

    def validate(self, model: Segmenter, loss: nn.Module, engine: Engine) -> Validation:
        """Score the model; with several ranks each scores its share, and all get the scores of the whole."""
        ...


@dataclass
class Feed:
    """Batches of images and masks for one rank.

    Args:
        train: data set to draw from.
        val: data set to score on.
        augment: joint transform of a training image and its mask.
        batch_size: images in a batch, over all ranks.
        seed: decides order and augmentation, with epoch and sample.
        workers: loading processes.
        background: id of the class that is no object; None: there is none.
        rank: this rank.
        world: number of ranks.
    """

    train: SegmentationData
    val: SegmentationData
    augment: Callable
    batch_size: Count
    seed: int
    workers: int
    background: int | None = None
    rank: int = 0
    world: int = 1
    score_names: Sequence[str] = field(init=False)
    lowest: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Refuse a batch size that does not fit, long before the first batch."""
        check_batch_size(self.batch_size, len(self.train), self.world)
        empty = ConfusionMatrix(len(self.val.classes), background=self.background).compute()
        self.score_names = sorted(key for key, value in empty.items() if value is None)

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

    def validate(self, model: Segmenter, loss: nn.Module, engine: Engine) -> Validation:
        """Return the scores of `evaluate`, and the first image beside its prediction and reference."""
        pictures: list[np.ndarray] = []
        data = self.val
        draw = partial(compare, classes=data.classes, palette=data.palette, ignore_index=data.ignore_index)

        def keep_first(batch: Batch, ids: Tensor) -> None:
            if not pictures:
                frame, mask = batch.image[0].permute(1, 2, 0).cpu().numpy(), batch.mask[0].cpu().numpy()
                pictures.append(draw(frame, ids[0].cpu().numpy(), mask))

        scores = evaluate(model, data, engine, background=self.background, loss=loss, on_batch=keep_first)
        return Validation(scores, pictures[0] if pictures else None)
