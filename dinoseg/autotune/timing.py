"""Timing of a recipe on this machine: a few training steps and validated images, in a separate process."""

import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from typing import Any

import torch

from dinoseg.autotune.trial import Trial, try_steps
from dinoseg.core.contracts import Loss
from dinoseg.core.shapes import Batch, FeatureBatch
from dinoseg.core.sizes import evenly_spaced
from dinoseg.models.model import SegmentationModel
from dinoseg.training.engine import Engine
from dinoseg.training.feature_cache.form import Stored, size_of
from dinoseg.training.image_data_module import ImageDataModule
from dinoseg.training.parts import TrainingParts
from dinoseg.training.validation import evaluate
from dinoseg.utils.devices import synchronize
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
        cached: the same on cached features; None: the model cannot be cut into a frozen and a trained part.
        forward: forward pass of the frozen part per image, which is computed once if cached.
        bytes: size of the cached features of one view.
        val: to validate an image, read from its file.
    """

    start: float
    tuned: float | None
    frozen: float | None
    cached: float | None
    forward: float
    bytes: int
    val: float

    def of(self, frozen_share: float) -> float:
        """Return the seconds per training image if the backbone is frozen for a share of the steps."""
        tuned, frozen = self.tuned, self.frozen
        if tuned is None or frozen is None:
            only = frozen if tuned is None else tuned
            assert only is not None
            return only
        return frozen_share * frozen + (1 - frozen_share) * tuned


def estimate_times(seconds: float) -> RecipeTimes:
    """Return a cautious estimate for a recipe whose timing did not finish, or start, within `seconds`."""
    image = seconds / (_STEPS + _WARMUP + _VALIDATED)
    return RecipeTimes(start=image, tuned=image, frozen=image, cached=None, forward=image, bytes=0, val=image)


@dataclass(frozen=True)
class _RepeatedFeatures:
    """Batch of features that is yielded repeatedly instead of cached ones; it is already on the device."""

    batch: FeatureBatch

    @property
    def names(self) -> list[str]:
        """Names of the samples."""
        return self.batch.names

    def to(self, device: torch.device) -> FeatureBatch:
        """Return the features unchanged."""
        return self.batch


def time_recipe(
    tuned: TrainingParts | None,
    frozen: TrainingParts | None,
    data_module: ImageDataModule,
    engine: Engine,
    *,
    began: float,
    minutes: float,
    dtype: Stored,
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
        dtype: type in which features are cached.
        ranks: that share a batch and a validation at the speed of this process. One rank's share is timed, and the time
            per image is divided by their number. Waiting between ranks is not counted.
        until: deadline on the clock of `time.monotonic`; after it one step of each kind suffices.

    Raises:
        UserError: the parts do not fit together.
        OutOfMemory: memory does not suffice.
    """
    parts = tuned or frozen
    assert parts is not None
    batches = data_module.train_batches(start=0)
    first: Any = next(batches)
    start = time.perf_counter() - began
    lasting = min(_MAX, _SHARE * 60 * minutes)
    timed = partial(try_steps, engine=engine, steps=_STEPS, warmup=_WARMUP, until=until)
    images = ranks * parts.batch_size * parts.accumulate
    tuned_image = frozen_image = cached = None
    forward, size = 0.0, 0
    if tuned is not None:
        tuned_image = _later_median(timed(tuned, tuned.model, batches=batches, lasting=lasting)) / images
    if frozen is not None:
        frozen_image = _later_median(timed(frozen, frozen.model, batches=batches, lasting=lasting / 2)) / images
    model = engine.place((frozen or parts).model())
    cut = None if frozen is None else _cut(model, first, engine)
    if frozen is not None and cut is not None:
        features, seconds = cut
        forward = seconds / (ranks * len(first.names))
        size = size_of([part[0] for part in features.tensors], dtype)
        again = _RepeatedFeatures(FeatureBatch(features, first.mask.to(engine.device), first.names))
        trial = timed(frozen, lambda: model, batches=repeat(again), lasting=lasting / 4)
        cached = _later_median(trial) / images
    val = _seconds_of_val(parts.loss(), data_module, model, engine, until) / ranks
    return RecipeTimes(start, tuned_image, frozen_image, cached, forward, size, val)


def _later_median(trial: Trial) -> float:
    """Return the median seconds of the later half of the steps.

    While workers still read ahead, a step may take half as long again.
    """
    return statistics.median(trial.seconds[len(trial.seconds) // 2 :])


def _cut(model: SegmentationModel, batch: Batch, engine: Engine) -> tuple[Any, float] | None:
    """Return the output of the frozen part for a batch and its seconds; None if the model cannot be cut."""
    images = batch.to(engine.device).image
    try:
        for _ in range(2):
            began = time.perf_counter()
            with engine.autocast():
                features = model.train().frozen(images)
            synchronize(engine.device)
            seconds = time.perf_counter() - began
    except UserError:
        return None
    return features, seconds


def _seconds_of_val(
    loss: Loss, data_module: ImageDataModule, model: SegmentationModel, engine: Engine, until: float = math.inf
) -> float:
    """Return the seconds to read, predict and score a validation image, loss included, averaged over a few."""
    data, loss = data_module.val, loss.to(engine.device)
    places = evenly_spaced(len(data), _VALIDATED)  # evenly spaced, since sizes may differ

    def validate_images(some: Sequence[int]) -> float:
        began, count = time.perf_counter(), 0

        def batches() -> Iterator[Batch]:
            nonlocal count
            for index in some:
                if count and time.monotonic() >= until:
                    return
                count += 1
                yield Batch.stack([data[index]])

        evaluate(model, data, engine, policy=data_module.policy, loss=loss, batches=batches())
        return (time.perf_counter() - began) / count

    first = validate_images(places[:1])  # slower than later images
    return first if time.monotonic() >= until else validate_images(places)
