"""Interface of training data: batches to train on, and a validation."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence, Sized
from typing import Any, NamedTuple, Protocol

import numpy as np

from dinoseg.core.contracts import Loss
from dinoseg.core.shapes import SegmentationData
from dinoseg.core.sizes import evenly_spaced
from dinoseg.data.loader import TrainViews
from dinoseg.models.model import SegmentationModel
from dinoseg.training.engine import Engine
from dinoseg.training.step import StepScores

SHOWN_SIDE = 384  # maximum side in pixels of a visualised frame, since a run saves many


class Validation(NamedTuple):
    """Scores of a validation, and visualised predictions of some of its samples."""

    scores: dict[str, Any]  # numbers, None where undefined; others are left out of the log
    pictures: dict[str, np.ndarray]  # by the sample's name, (H, W, 3) uint8; only rank 0 has any


class DataModule(Protocol):
    """Source of training batches for `fit`, and validation of the trained model."""

    seed: int
    score_names: Sequence[str]  # validation scores that can select the best checkpoint
    lowest: Sequence[str]  # those of them for which lower is better

    @property
    def epoch(self) -> float:
        """Return the number of batches in which each sample is seen once."""
        ...

    @property
    def train(self) -> Sized:
        """Return the training samples."""
        ...

    @property
    def val(self) -> Sized:
        """Return the validation samples."""
        ...

    @property
    def remedy(self) -> str:
        """Return advice on loading batches faster, in a sentence or two."""
        ...

    def train_batches(self, start: int) -> Iterator[Any]:
        """Yield this rank's share of every batch from number `start` on, without end.

        A batch has `image`, the input of the model; `names`, of its samples; `to(device)`; and `split(parts)`.
        """
        ...

    def step_scores(self, engine: Engine) -> StepScores | None:
        """Return the scores of how well a training step predicts its batches; None: they have no classes."""
        ...

    def validate(self, model: SegmentationModel, loss: Loss, engine: Engine) -> Validation:
        """Score the model; each rank scores its share, and all ranks get the scores of the whole dataset."""
        ...


class BatchCache(ABC):
    """Base class of caches of what a model's frozen part computes: they replace the batches of images and masks.

    Their batches have the members of those of `DataModule.train_batches` but `image`, and `size`, the (H, W) of the
    images. `to(device)` returns a batch that the model takes.
    """

    @abstractmethod
    def train_batches(
        self, drawn: TrainViews, *, workers: int, batch_size: int, start: int, rank: int, world_size: int
    ) -> Iterator[Any]:
        """Yield this rank's share of each training batch, with the same views as `loader.train_batches`."""

    @abstractmethod
    def eval_batches(self, data: SegmentationData, *, workers: int, rank: int, world_size: int) -> Iterator[Any]:
        """Yield this rank's samples once and in order, each in a batch of its own and not augmented."""

    @abstractmethod
    def remedy(self, workers: int) -> str:
        """Return advice on loading batches faster with `workers` processes, in a sentence or two."""


def spread(samples: int, wanted: int, world_size: int) -> list[int]:
    """Return the indices of at most `wanted` samples, evenly spread over those that rank 0 validates."""
    validated = range(0, samples, world_size)
    return [validated[index] for index in evenly_spaced(len(validated), wanted)]
