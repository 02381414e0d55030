"""Timing of a recipe on this machine: a few training steps and validated images, in a separate process."""

import math
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import repeat
from typing import Any

import torch

from dinoseg.autotune.trial import try_steps
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
        image: per image of a training step on image files, including the time to wait for data.
        cached: the same on cached features; None: the model cannot be cut into a frozen and a trained part.
        frozen: forward pass of the frozen part per image, which is computed once if cached.
        bytes: size of the cached features of one view.
        val: to validate an image, read from its file.
        resting: like `image` with the backbone frozen at first; None: not timed, or no backbone parameter is trained.
    """

    start: float
    image: float
    cached: float | None
    frozen: float
    bytes: int
    val: float
    resting: float | None = None

    def on_smaller_images(self, scale: float) -> "RecipeTimes":
        """Return an estimate for images with sides multiplied by `scale`; times scale with the area."""
        area = scale**2
        cached = None if self.cached is None else area * self.cached
        return replace(
            self, image=area * self.image, cached=cached, frozen=area * self.frozen, val=area * self.val, resting=None
        )


def estimate_times(seconds: float) -> RecipeTimes:
    """Return a cautious estimate for a recipe whose timing did not finish, or start, within `seconds`."""
    image = seconds / (_STEPS + _WARMUP + _VALIDATED)
    return RecipeTimes(start=image, image=image, cached=None, frozen=image, bytes=0, val=image)


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
    parts: TrainingParts,
    data_module: ImageDataModule,
    engine: Engine,
    *,
    began: float,
    minutes: float,
    dtype: Stored,
    rested: TrainingParts | None = None,
    ranks: int = 1,
    until: float = math.inf,
) -> RecipeTimes:
    """Time a recipe on its own data with random weights; call it in a separate process that is no rank.

    Args:
        parts: of the training; the batch size is that of one rank.
        data_module: its data.
        engine: device and precision.
        began: start of the process's work, on the clock of `time.perf_counter`.
        minutes: the whole time budget; timing takes a share of it.
        dtype: type in which features are cached.
        rested: parts of the training with a backbone that is frozen at first; such steps are timed too, if the backbone
            is trained at all. None: it is never frozen at first.
        ranks: that share a batch and a validation at the speed of this process. One rank's share is timed, and the time
            per image is divided by their number. Waiting between ranks is not counted.
        until: deadline on the clock of `time.monotonic`, shared by all processes; after it one step of each kind
            suffices.

    Raises:
        UserError: the parts do not fit together.
        OutOfMemory: memory does not suffice.
    """
    model = engine.place(parts.model())
    batches = data_module.train_batches(start=0)
    first: Any = next(batches)
    start = time.perf_counter() - began
    has_rest = rested is not None and model.backbone.first_trained is not None
    if rested is not None and has_rest:
        parts = rested
    cut = _cut(model, first, engine)
    lasting = min(_MAX, _SHARE * 60 * minutes)
    timed = partial(try_steps, parts, engine=engine, steps=_STEPS, warmup=_WARMUP, until=until)
    live = timed(parts.model, batches=batches, lasting=lasting)
    images = ranks * parts.batch_size * parts.accumulate
    resting = None
    if has_rest:
        trial = timed(parts.model, batches=batches, lasting=lasting / 2, rests=True)
        resting = _later_median(trial.seconds) / images
    cached, frozen, size = None, 0.0, 0
    if cut is not None:
        features, frozen = cut
        size = size_of([part[0] for part in features.tensors], dtype)
        again = _RepeatedFeatures(FeatureBatch(features, first.mask.to(engine.device), first.names))
        trial = timed(lambda: model, batches=repeat(again), lasting=lasting / 4)
        cached = _later_median(trial.seconds) / images
    val = _seconds_of_val(parts.loss(), data_module, model, engine, until) / ranks
    image = _later_median(live.seconds) / images
    return RecipeTimes(start, image, cached, frozen / (ranks * len(first.names)), size, val, resting)


def _later_median(seconds: Sequence[float]) -> float:
    """Return the median of the later half of the steps.

    While workers still read ahead, a step may take half as long again.

    Args:
        seconds: of each step.
    """
    return statistics.median(seconds[len(seconds) // 2 :])


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

    def validated(some: Iterable[int]) -> float:
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

    first = validated(places[:1])  # slower than later images
    return first if time.monotonic() >= until else validated(places)
