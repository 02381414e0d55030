"""Some steps of a recipe's own training, for what they take: nothing is learnt that is kept, and nothing written."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sized
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
from dinoseg.utils.devices import synchronize
from dinoseg.utils.errors import UserError

_NEVER = 10**9  # steps
_MOST = 100  # of these, however short they are


class _Enough(Exception):  # noqa: N818 - an end, not an error
    """All steps are done."""


@dataclass
class Trial:
    """What steps of a training took.

    Attributes:
        seconds: of each step that was timed.
        waited: seconds of it until its batches were there.
        peak: bytes at most of these and the steps before them, beside `before`.
        before: bytes that the process or the device held without the model.
    """

    seconds: list[float] = field(default_factory=list)
    waited: list[float] = field(default_factory=list)
    peak: int = 0
    before: int = 0


@dataclass
class _TimedFeed:
    """A feed that takes the time at each batch, and ends the training after so many steps, and so many seconds."""

    batches: Iterator[Any]
    device: torch.device
    accumulate: int
    warmup: int
    steps: int
    lasting: float
    until: float
    trial: Trial
    seed: int
    score_names: tuple[str, ...]
    train: Sized = ()
    val: Sized = ()
    lowest: tuple[str, ...] = ()
    remedy: str = ""
    epoch: float = 1.0

    def train_batches(self, start: int) -> Iterator[Any]:
        """Yield the batches of all steps; what is asked for one more ends the training."""
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
            del noted[: min(self.warmup, len(noted) - 1)]  # of a trial that is cut short, a step is left
        raise _Enough

    @property
    def most(self) -> int:
        """Steps that are tried at most."""
        return max(self.warmup + self.steps, _MOST if self.lasting else 0)

    def _note(self, began: float | None) -> float:
        """Note the seconds since a step began, once it is done, and return when the next one begins."""
        synchronize(self.device)
        now = time.perf_counter()
        if began is not None:
            self.trial.seconds.append(now - began)
        return now

    def tally(self, engine: Engine) -> Tally | None:
        """Count nothing."""

    def validate(self, model: Segmenter, loss: Loss, engine: Engine) -> Validation:
        """Validate nothing: no step is the last one."""
        raise NotImplementedError


def drawn_steps(values: Mapping[str, Any], samples: int, steps: int = 2) -> Trial:
    """Try a config's steps on so many samples of noise each, in a process that holds nothing else.

    Args:
        values: the whole config, plain.
        samples: at once.
        steps: to try.

    Raises:
        OutOfMemory: there is too little.
    """
    cfg, engine = settled(values, instead={"devices": 1})
    batches = repeat(drawn_batch(cfg, samples))
    return try_steps(cfg, partial(build.model, cfg, untrained=True), engine, batches, steps=steps)


def settled(values: Mapping[str, Any], instead: Mapping[str, Any] | None = None) -> tuple[DictConfig, Engine]:
    """Return a plain config as one, in a process that has read none, and its engine."""
    register_resolvers()
    cfg = OmegaConf.create(dict(values))
    return cfg, instantiate(cfg.engine, instead=instead)


def check_alone(cfg: DictConfig) -> None:
    """Refuse a trainer of several models, or of images without masks: what a step takes is asked of one and of labels.

    Raises:
        UserError: naming what to give.
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
    """Train a model for some steps by its config's own trainer.

    Args:
        cfg: the whole config.
        make: gives the model.
        engine: of one rank.
        batches: as many as the steps take, or more.
        steps: optimizer steps that are timed, at least.
        warmup: steps before them.
        lasting: seconds for which steps go on, however many these are.
        until: time of `time.monotonic` after which no further step is taken, but for a single one.
        rests: whether what the config lets rest at first does so in all of these steps; else all of it learns.
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
        if group["rests"]:
            group["rests"], group["begin"] = rests, feed.most / (feed.most + 1)
    # the feed ends it in place of the last step, after which it would validate
    lengths = {"steps": feed.most + 1, "val_every": _NEVER, "save_every": None, "max_minutes": None}
    fit = instantiate(cfg.trainer, without=("feed", "epochs", "val_images"), instead=lengths)
    checkpoints = Checkpoints(Path(), {}, writes=False)
    try:
        with RunLog("", visible=False) as log:
            fit(model, loss, feed, optimizer, engine, checkpoints, log, schedule=instantiate(cfg.optim.schedule))
    except _Enough:
        pass
    trial.peak = peak_memory(engine.device) - trial.before
    return trial
