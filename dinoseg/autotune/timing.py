"""What a recipe takes on this machine: some of its own steps and validated images, in a process of its own."""

import math
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import repeat
from typing import Any

import torch

from dinoseg.autotune.rules import REST
from dinoseg.autotune.trial import settled, try_steps
from dinoseg.config.nodes import instantiate
from dinoseg.core.shapes import Batch, FeatureBatch
from dinoseg.core.sizes import evenly_spaced
from dinoseg.experiment import build, criteria
from dinoseg.models.model import Segmenter
from dinoseg.tasks.choice import regime_of
from dinoseg.training.engine import Engine
from dinoseg.training.feature_cache.form import size_of
from dinoseg.training.feature_choice import stored_as
from dinoseg.training.validation import evaluate
from dinoseg.utils.devices import synchronize
from dinoseg.utils.errors import UserError

_STEPS, _WARMUP, _VALIDATED = 3, 1, 6
_SHARE, _MOST = 0.015, 8.0  # of the time that is given, and seconds: for which steps go on


@dataclass(frozen=True)
class Seconds:
    """What was measured of a recipe, in seconds.

    Attributes:
        start: until its first batch is there.
        image: of a training step, for each image, from files; data that is waited for counts.
        kept: the same from features that are kept; None: its model cannot be cut.
        frozen: what is frozen of a model, for an image, which is computed once where it is kept.
        bytes: that it takes to keep, of one view.
        val: to validate an image, read from its file.
        resting: what `image` is while the backbone rests; None: it was not asked, or nothing of the backbone learns.
    """

    start: float
    image: float
    kept: float | None
    frozen: float
    bytes: int
    val: float
    resting: float | None = None

    def on_smaller_images(self, scale: float) -> "Seconds":
        """Return an estimate for images whose sides are multiplied by `scale`: a share by their area."""
        area = scale**2
        kept = None if self.kept is None else area * self.kept
        return replace(
            self, image=area * self.image, kept=kept, frozen=area * self.frozen, val=area * self.val, resting=None
        )


def unmeasured(seconds: float) -> Seconds:
    """Return a careful estimate of a recipe whose timing did not end, or begin, within so many seconds."""
    image = seconds / (_STEPS + _WARMUP + _VALIDATED)
    return Seconds(start=image, image=image, kept=None, frozen=image, bytes=0, val=image)


@dataclass(frozen=True)
class _Again:
    """A batch of features that is drawn again and again, as one of kept ones: complete once it is on the device."""

    batch: FeatureBatch

    @property
    def names(self) -> list[str]:
        """Return the samples' names."""
        return self.batch.names

    def to(self, device: torch.device) -> FeatureBatch:
        """Return it."""
        return self.batch


def time_recipe(
    values: Mapping[str, Any], *, minutes: float, may_rest: bool = False, ranks: int = 1, until: float = math.inf
) -> Seconds:
    """Time a plain config on its own data, with random weights; call it in a process of its own, which is no rank.

    Args:
        values: the config.
        minutes: that are given for everything, of which timing takes a share.
        may_rest: whether to time steps of a backbone that rests as well, where it learns.
        ranks: that share a batch and the images of a validation, each as fast as this one: its share is timed, and an
            image then takes so much less. That they wait for one another is not counted.
        until: time of `time.monotonic`, the same in all processes, after which one step of each kind has to do.

    Raises:
        UserError: its parts do not go together.
        OutOfMemory: there is too little.
    """
    began = time.perf_counter()
    cfg, engine = settled(values, instead={"devices": 1})
    cfg.data.batch_size = max(1, cfg.data.batch_size // ranks)
    regime = regime_of(cfg)(cfg, engine)
    make = partial(build.model, cfg, untrained=True)
    model = engine.place(make())
    batches = regime.feed.train_batches(start=0)
    first = next(batches)
    start = time.perf_counter() - began
    may_rest = may_rest and model.backbone.first_trained is not None
    if may_rest:
        cfg.optim.optimizer.backbone_begin = REST
    cut = _cut(model, first, engine)
    lasting = min(_MOST, _SHARE * 60 * minutes)
    live = try_steps(cfg, make, engine, batches, steps=_STEPS, warmup=_WARMUP, lasting=lasting, until=until)
    images = ranks * cfg.data.batch_size * cfg.trainer.accumulate
    resting = None
    if may_rest:
        half = lasting / 2
        trial = try_steps(
            cfg, make, engine, batches, steps=_STEPS, warmup=_WARMUP, lasting=half, until=until, rests=True
        )
        resting = _later_median(trial.seconds) / images
    kept, frozen, size = None, 0.0, 0
    if cut is not None:
        features, frozen = cut
        size = size_of([part[0] for part in features.tensors], stored_as(cfg.features.dtype, {}))
        again = _Again(FeatureBatch(features, first.mask.to(engine.device), first.names))
        lasting /= 4
        trial = try_steps(
            cfg, lambda: model, engine, repeat(again), steps=_STEPS, warmup=_WARMUP, lasting=lasting, until=until
        )
        kept = _later_median(trial.seconds) / images
    val = _seconds_of_val(cfg, model, engine, until) / ranks
    image = _later_median(live.seconds) / images
    return Seconds(start, image, kept, frozen / (ranks * len(first.names)), size, val, resting)


def _later_median(seconds: Sequence[float]) -> float:
    """Return the median of the later half of steps: while workers still read ahead, a step may take half as long again.

    Args:
        seconds: of each step.
    """
    return statistics.median(seconds[len(seconds) // 2 :])


def _cut(model: Segmenter, batch: Batch, engine: Engine) -> tuple[Any, float] | None:
    """Return what is frozen of a batch, and the seconds that it took; None: the model cannot be cut."""
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


def _seconds_of_val(cfg: Any, model: Segmenter, engine: Engine, until: float = math.inf) -> float:
    """Return what an image takes as it is validated: read, predicted, its loss and counts; some of them are."""
    data, policy = build.dataset(cfg, "val"), instantiate(cfg.inference)
    loss = criteria.unweighted(cfg).to(engine.device)
    places = evenly_spaced(len(data), _VALIDATED)  # may be of many sizes

    def validated(some: Iterable[int]) -> float:
        began, count = time.perf_counter(), 0

        def batches() -> Iterator[Batch]:
            nonlocal count
            for place in some:
                if count and time.monotonic() >= until:
                    return
                count += 1
                yield Batch.stack([data[place]])

        evaluate(model, data, engine, policy=policy, loss=loss, batches=batches())
        return (time.perf_counter() - began) / count

    first = validated(places[:1])  # takes longer than others
    return first if time.monotonic() >= until else validated(places)
