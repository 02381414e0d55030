"""What a training asks of the place where its batches come from."""

from collections.abc import Iterator, Sequence, Sized
from typing import Any, NamedTuple, Protocol

import numpy as np

from dinoseg.core.contracts import Loss
from dinoseg.core.sizes import evenly_spaced
from dinoseg.models.model import Segmenter
from dinoseg.training.engine import Engine
from dinoseg.training.tally import Tally

SHOWN_SIDE = 384  # pixels at most of a frame in the pictures of a validation, of which a run keeps many


class Validation(NamedTuple):
    """The scores of a validation, and pictures of some of its samples."""

    scores: dict[str, Any]  # numbers, None where undefined; others are left out of the log
    pictures: dict[str, np.ndarray]  # by the sample's name, (H, W, 3) uint8; only rank 0 has any


class Feed(Protocol):
    """What `fit` trains from, and how what it trained is validated."""

    seed: int
    score_names: Sequence[str]  # of a validation that may decide which checkpoint is best
    lowest: Sequence[str]  # of these, where the lowest value is the best

    @property
    def epoch(self) -> float:
        """Return the batches in which each sample is seen once."""
        ...

    @property
    def train(self) -> Sized:
        """Return what is trained on."""
        ...

    @property
    def val(self) -> Sized:
        """Return what is validated on."""
        ...

    @property
    def remedy(self) -> str:
        """Return what lets batches come sooner, in a sentence or two."""
        ...

    def train_batches(self, start: int) -> Iterator[Any]:
        """Yield this rank's share of every batch from number `start` on, without end.

        A batch has `image`, what the model takes; `names`, of its samples; `to(device)`; and `split(parts)`.
        """
        ...

    def tally(self, engine: Engine) -> Tally | None:
        """Return what counts how well a training step predicts its batches; None: they have no classes."""
        ...

    def validate(self, model: Segmenter, loss: Loss, engine: Engine) -> Validation:
        """Score the model; with several ranks each scores its share, and all get the scores of the whole."""
        ...


def spread(samples: int, wanted: int, world: int) -> list[int]:
    """Return the indices of at most `wanted` samples, evenly spread over those that rank 0 validates."""
    validated = range(0, samples, world)
    return [validated[place] for place in evenly_spaced(len(validated), wanted)]
