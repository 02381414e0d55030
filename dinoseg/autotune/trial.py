"""Short trials of a recipe's own training loop, to measure time and memory; nothing is saved."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from dinoseg.autotune.stand_in import drawn_batch
from dinoseg.config.nodes import instantiate
from dinoseg.config.resolvers import register_resolvers
from dinoseg.core.contracts import Loss
from dinoseg.experiment import build, criteria
from dinoseg.models.model import Segmenter
from dinoseg.report.log import RunLog
from dinoseg.training.checkpoint import Checkpoints
from dinoseg.training.engine import Engine
from dinoseg.training.feed import Validation
from dinoseg.training.meter import held_memory, peak_memory, reset_peak_memory
from dinoseg.training.tally import Tally
from dinoseg.training.trainer import Experiment, fit
from dinoseg.utils.devices import synchronize
from dinoseg.utils.errors import UserError

_NEVER = 10**9  # steps
_MOST = 100  # steps at most if they go by seconds (`lasting`), however short they are


class _Enough(Exception):  # noqa: N818 - an end, not an error
    """Signal that all steps are done."""


@dataclass
class Trial:
    """Time and memory of trial steps.

    Attributes:
        seconds: of each timed step.
        waited: seconds of each that were spent waiting for its batches.
        peak: peak bytes of timed and warm-up steps, in addition to `before`.
        before: bytes that the process or the device held without the model.
    """

    seconds: list[float] = field(default_factory=list)
    waited: list[float] = field(default_factory=list)
    peak: int = 0
    before: int = 0


@dataclass
class _TimedFeed:
    """Feed that records the time at each batch, and ends the training after enough steps and seconds."""

    batches: Iterator[Any]
    device: torch.device
    accumulate: int
    warmup: int
    steps: int
    lasting: float
    until: float
    trial: Trial
    seed: int
    score_names: Sequence[str]
    train: Sized = ()
    val: Sized = ()
    lowest: Sequence[str] = ()
    remedy: str = ""
    epoch: float = 1.0

    def train_batches(self, start: int) -> Iterator[Any]:
        """Yield the batches of all steps; requesting one more ends the training."""
        began = None
        for step in range(self.most + 1):
            began = self._note(began)
            enough = sum(self.trial.seconds[self.warmup :]) >= self.lasting
            overdue = step > 0 and time.monotonic() >= self.until
            if step == self.most or overdue or (enough and step >= self.warmup + self.steps):
                break
            self.trial.waited.append(0.0)
            for _ in range(self.accumulate):
                asked = time.perf_counter()
                batch = next(self.batches)
                self.trial.waited[-1] += time.perf_counter() - asked
                yield batch
        for noted in (self.trial.seconds, self.trial.waited):
            del noted[: min(self.warmup, len(noted) - 1)]  # a trial that is cut short keeps one step
        raise _Enough

    @property
    def most(self) -> int:
        """Maximum number of steps."""
        return max(self.warmup + self.steps, _MOST if self.lasting else 0)

    def _note(self, began: float | None) -> float:
        """Record the duration of the step that began at `began`, if any; return the current time."""
        synchronize(self.device)
        now = time.perf_counter()
        if began is not None:
            self.trial.seconds.append(now - began)
        return now

    def tally(self, engine: Engine) -> Tally | None:
        """Return None: nothing is counted."""

    def validate(self, model: Segmenter, loss: Loss, engine: Engine) -> Validation:
        """Raise NotImplementedError: a trial ends before its last step, so it never validates."""
        raise NotImplementedError


def drawn_steps(values: Mapping[str, Any], samples: int, steps: int = 2) -> Trial:
    """Run trial steps of a config on random samples, in a process that holds nothing else.

    Args:
        values: the whole config, plain.
        samples: batch size.
        steps: number of steps.

    Raises:
        OutOfMemory: memory does not suffice.
    """
    cfg, engine = settled(values, instead={"devices": 1})
    batches = repeat(drawn_batch(cfg, samples))
    return try_steps(cfg, partial(build.model, cfg, untrained=True), engine, batches, steps=steps)


def settled(values: Mapping[str, Any], instead: Mapping[str, Any] | None = None) -> tuple[DictConfig, Engine]:
    """Return a plain config as a DictConfig, in a process that has not loaded a config yet, and its engine."""
    register_resolvers()
    cfg = OmegaConf.create(dict(values))
    return cfg, instantiate(cfg.engine, instead=instead)


def check_alone(cfg: DictConfig) -> None:
    """Refuse trainers of several heads or with unlabelled images: estimates cover one head and labelled images only.

    Raises:
        UserError: naming the overrides to give instead.
    """
    if "heads" in cfg.trainer:
        raise UserError(
            f"trainer={cfg.choices.trainer} trains several heads: what one takes is told here. Give head=NAME, without "
            "heads and trainer."
        )
    if "unlabelled" in cfg.trainer:
        raise UserError(
            f"trainer={cfg.choices.trainer} is not foretold: its step takes the images without masks as well. Leave "
            "trainer out for what the images with masks take; a batch of both takes that of all their views together."
        )


def try_steps(
    cfg: DictConfig,
    make: Callable[[], Segmenter],
    engine: Engine,
    batches: Iterator[Any],
    *,
    steps: int,
    warmup: int = 0,
    lasting: float = 0.0,
    until: float = math.inf,
    rests: bool = False,
) -> Trial:
    """Train a model for a few steps with its config's own trainer.

    Args:
        cfg: the whole config.
        make: returns the model.
        engine: of one rank.
        batches: at least as many as the steps need.
        steps: minimum number of timed optimizer steps.
        warmup: steps before them.
        lasting: minimum seconds of timed steps in total, up to 100 steps.
        until: deadline on the clock of `time.monotonic`; after it no step starts except the first.
        rests: whether parts that the config freezes at first stay frozen in all these steps; else they are trained.
    """
    reset_peak_memory(engine.device)
    trial = Trial(before=held_memory(engine.device))
    model = make().to(engine.device)
    loss, optimizer = criteria.unweighted(cfg).to(engine.device), build.optimizer(cfg, model)
    feed = _TimedFeed(
        batches,
        engine.device,
        cfg.trainer.accumulate,
        warmup,
        steps,
        lasting,
        until,
        trial,
        seed=build.seed_of(cfg),
        score_names=(cfg.trainer.score,),
    )
    for group in optimizer.param_groups:
        if group["frozen"]:
            group["frozen"], group["start"] = rests, feed.most / (feed.most + 1)
    # the feed raises before the last step, after which the trainer would validate
    lengths = {"steps": feed.most + 1, "val_every": _NEVER, "save_every": None, "max_minutes": None}
    settings, schedule = build.loop_settings(cfg, lengths), instantiate(cfg.optim.schedule)
    checkpoints = Checkpoints(Path(), {}, writes=False)
    try:
        with RunLog("", visible=False) as log:
            fit(Experiment(model, loss, feed, optimizer, schedule, engine, checkpoints, log, settings))
    except _Enough:
        pass
    trial.peak = peak_memory(engine.device) - trial.before
    return trial
