"""Short trials of a recipe's own training loop, to measure time and memory; nothing is saved."""

import math
import time
from collections.abc import Iterator, Sequence, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dinoseg.core.contracts import Loss
from dinoseg.extensions.auto.parts import TrainingParts
from dinoseg.models.model import SegmentationModel
from dinoseg.report.log import RunLog
from dinoseg.training.checkpoint import Checkpointer
from dinoseg.training.data_module import Validation
from dinoseg.training.engine import Engine
from dinoseg.training.meter import peak_memory, reset_peak_memory, used_memory
from dinoseg.training.step import StepScores
from dinoseg.training.trainer import TrainingSetup, fit

_MAX = 100  # steps at most if they go by seconds (`lasting`), however short they are


class _TrialDone(Exception):  # noqa: N818 - an end, not an error
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
class _TimedDataModule:
    """Data module that records the time at each batch, and ends the training after enough steps and seconds."""

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
        began = self._now()
        for step in range(self.most):
            self.trial.waited.append(0.0)
            for _ in range(self.accumulate):
                requested_at = time.perf_counter()
                batch = next(self.batches)
                self.trial.waited[-1] += time.perf_counter() - requested_at
                yield batch
            now = self._now()
            self.trial.seconds.append(now - began)
            began = now
            enough = sum(self.trial.seconds[self.warmup :]) >= self.lasting and step + 1 >= self.warmup + self.steps
            if enough or time.monotonic() >= self.until:
                break
        for noted in (self.trial.seconds, self.trial.waited):
            del noted[: min(self.warmup, len(noted) - 1)]  # a trial that is cut short keeps one step
        raise _TrialDone

    @property
    def most(self) -> int:
        """Maximum number of steps."""
        return max(self.warmup + self.steps, _MAX if self.lasting else 0)

    def _now(self) -> float:
        synchronize(self.device)
        return time.perf_counter()

    def step_scores(self, engine: Engine) -> StepScores | None:
        """Return None: nothing is counted."""

    def validate(self, model: SegmentationModel, loss: Loss, engine: Engine) -> Validation:
        """Raise NotImplementedError: a trial ends before its last step, so it never validates."""
        raise NotImplementedError


def try_steps(
    parts: TrainingParts,
    engine: Engine,
    batches: Iterator[Any],
    *,
    steps: int,
    warmup: int = 0,
    lasting: float = 0.0,
    until: float = math.inf,
) -> Trial:
    """Train a model for a few steps with its recipe's own trainer.

    Args:
        parts: of the training.
        engine: of one rank.
        batches: at least as many as the steps need.
        steps: minimum number of timed optimizer steps.
        warmup: steps before them.
        lasting: minimum seconds of timed steps in total, up to 100 steps.
        until: deadline on the clock of `time.monotonic`; after it no step starts except the first.
    """
    reset_peak_memory(engine.device)
    trial = Trial(before=used_memory(engine.device))
    model = parts.model().to(engine.device)
    loss, optimizer = parts.loss().to(engine.device), parts.optimizer(model)
    data_module = _TimedDataModule(
        batches,
        engine.device,
        parts.accumulate,
        warmup,
        steps,
        lasting,
        until,
        trial,
        seed=parts.seed,
        score_names=(parts.score,),
    )
    for group in optimizer.param_groups:
        if group["backbone"]:  # a backbone that the recipe freezes at first is timed as it is trained later
            group["frozen_until"] = 0.0
    # the feed raises before the last step, after which `fit` would validate
    settings = parts.settings(data_module.most + 1)
    checkpoints = Checkpointer(Path(), {}, writes=False)
    try:
        with RunLog("", visible=False) as log:
            fit(
                TrainingSetup(model, loss, data_module, optimizer, parts.schedule(), engine, checkpoints, log, settings)
            )
    except _TrialDone:
        pass
    trial.peak = peak_memory(engine.device) - trial.before
    return trial


def synchronize(device: torch.device) -> None:
    """Wait until an accelerator has finished its queued work; no-op on a CPU."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()
