"""Timing of a recipe on this machine: a few training steps and validated images, in a separate process."""

import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch

from dinoseg.core.contracts import Loss
from dinoseg.core.shapes import Batch
from dinoseg.core.sizes import evenly_spaced
from dinoseg.extensions.auto.parts import TrainingParts
from dinoseg.extensions.auto.trial import synchronize, try_steps
from dinoseg.models.model import SegmentationModel
from dinoseg.training.engine import Engine
from dinoseg.training.image_data_module import ImageDataModule
from dinoseg.training.validation import evaluate
from dinoseg.utils.errors import UserError

_STEPS, _WARMUP, _VALIDATED = 3, 1, 6
_SHARE, _MAX = 0.015, 8.0  # share of the time budget, and a maximum in seconds, for the timed steps


@dataclass(frozen=True)
class RecipeTimes:
    """Measured times of a recipe, in seconds.

    Attributes:
        start: until the first batch is ready.
        tuned: per image of a training step, including the time to wait for data; None: the backbone is not trained.
        frozen: the same with a frozen backbone; None: not timed.
        forward: part of `frozen` that a feature cache saves, the pass through the frozen part; 0: nothing is cached.
        val: to validate an image, read from its file.
    """

    start: float
    tuned: float | None
    frozen: float | None
    forward: float
    val: float

    def of(self, frozen_share: float) -> float:
        """Return the seconds per training image if the backbone is frozen for a share of the steps."""
        frozen = self.tuned if self.frozen is None else self.frozen
        tuned = self.frozen if self.tuned is None else self.tuned
        assert frozen is not None and tuned is not None
        return frozen_share * frozen + (1 - frozen_share) * tuned


def estimate_times(seconds: float) -> RecipeTimes:
    """Return a cautious estimate for a recipe whose timing did not finish, or start, within `seconds`."""
    image = seconds / (_STEPS + _WARMUP + _VALIDATED)
    return RecipeTimes(start=image, tuned=image, frozen=image, forward=0.0, val=image)


def time_recipe(
    tuned: TrainingParts | None,
    frozen: TrainingParts | None,
    data_module: ImageDataModule,
    engine: Engine,
    *,
    began: float,
    minutes: float,
    ranks: int = 1,
    until: float = math.inf,
) -> RecipeTimes:
    """Time a recipe on its own data with random weights; call it in a separate process that is no rank.

    Args:
        tuned: parts of the training with a trained backbone; None: it is not timed.
        frozen: parts of the training with a frozen backbone; None: it is not timed. At least one of both is given, and
            the batch size is that of one rank.
        data_module: its data.
        engine: device and precision.
        began: start of the process's work, on the clock of `time.perf_counter`.
        minutes: the whole time budget; timing takes a share of it.
        ranks: that share a batch and a validation at the speed of this process. One rank's share is timed, and the time
            per image is divided by their number. Waiting between ranks is not counted.
        until: deadline on the clock of `time.monotonic`; after it one step suffices, and none trains the backbone if a
            frozen one was timed.

    Raises:
        UserError: the parts do not fit together.
        OutOfMemory: memory does not suffice.
    """
    parts = tuned or frozen
    assert parts is not None
    batches = data_module.train_batches(start=0)
    first: Any = next(batches)
    start = time.perf_counter() - began
    images = ranks * parts.batch_size * parts.accumulate
    lasting = min(_MAX, _SHARE * 60 * minutes)

    def time_image(recipe: TrainingParts | None) -> float | None:
        if recipe is None:
            return None
        given = chain([first], batches)
        trial = try_steps(recipe, engine, given, steps=_STEPS, warmup=_WARMUP, lasting=lasting, until=until)
        return _later_median(trial.seconds) / images

    frozen_image = time_image(frozen)
    model = engine.place((frozen or parts).model())
    forward = 0.0 if frozen is None else _seconds_of_forward(model, first, engine) / (ranks * len(first.names))
    val = _seconds_of_val(parts.loss(), data_module, model, engine, until) / ranks
    is_overdue = frozen is not None and time.monotonic() >= until
    return RecipeTimes(start, None if is_overdue else time_image(tuned), frozen_image, forward, val)


def _later_median(seconds: Sequence[float]) -> float:
    """Return the median of the later half of the steps: while workers still read ahead, steps take longer."""
    return statistics.median(seconds[len(seconds) // 2 :])


def _seconds_of_forward(model: SegmentationModel, batch: Batch, engine: Engine) -> float:
    """Return the seconds of the frozen part's second forward pass; 0 if the model cannot be cut behind it."""
    images = batch.to(engine.device).image
    try:
        for _ in range(2):
            began = time.perf_counter()
            with torch.no_grad(), engine.autocast():
                model.train().frozen(images)
            synchronize(engine.device)
    except UserError:
        return 0.0
    return time.perf_counter() - began


def _seconds_of_val(
    loss: Loss, data_module: ImageDataModule, model: SegmentationModel, engine: Engine, until: float = math.inf
) -> float:
    """Return the seconds to read, predict and score a validation image, loss included, averaged over a few."""
    data = data_module.val
    count = 0

    def batches() -> Iterator[Batch]:
        nonlocal count
        for index in evenly_spaced(len(data), _VALIDATED):  # evenly spaced, since sizes may differ
            if count and time.monotonic() >= until:
                return
            count += 1
            yield Batch.stack([data[index]])

    began = time.perf_counter()
    evaluate(model, data, engine, strategy=data_module.strategy, loss=loss.to(engine.device), batches=batches())
    return (time.perf_counter() - began) / count
