"""Training loop of several heads on one frozen backbone; each head is trained as it would be alone."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from torch.optim import Optimizer

from dinoseg.core.contracts import Loss
from dinoseg.inference.memory import tells_shortage
from dinoseg.report.log import RunLog
from dinoseg.training import checkpoint
from dinoseg.training.checkpoint import Checkpoints, Progress
from dinoseg.training.engine import Engine
from dinoseg.training.feed import Validation
from dinoseg.training.image_feed import ImageFeed
from dinoseg.training.meter import Meter
from dinoseg.training.optim import ScheduleState
from dinoseg.training.shared_features import SharingSegmenter
from dinoseg.training.step import NonFiniteLoss, StepOutput
from dinoseg.training.stopwatch import Stopwatch
from dinoseg.training.time_limit import TimeLimit
from dinoseg.training.trained_head import HeadTraining
from dinoseg.training.trainer import NOTICE, Experiment, Settings
from dinoseg.utils.atomic import write_json
from dinoseg.utils.errors import UserError
from dinoseg.utils.interrupt import Deferral, deferred

logger = logging.getLogger(__name__)
DROPPED = "dropped.json"  # reason, in the folder of a head that has dropped out


class HeadParts(NamedTuple):
    """Arguments of `fit` for one head, and the name and folder of its run."""

    name: str
    folder: Path
    model: SharingSegmenter
    loss: Loss
    optimizer: Optimizer
    checkpoints: Checkpoints
    log: RunLog


@dataclass
class Outcome:
    """Result of one head's training.

    Attributes:
        run: progress of its run.
        share: its share of the time spent in training steps; None if there were none.
        dropped: why its training was abandoned; None if it was not.
    """

    run: Progress
    share: float | None
    dropped: str | None


def fit_heads(
    parts: Sequence[HeadParts],
    feed: ImageFeed,
    engine: Engine,
    keep: Callable[[int], None],
    schedule: Callable[[int, int], float],
    settings: Settings,
) -> list[Outcome]:
    """Train each head from its checkpoint as `fit` would alone, but read and encode each batch only once.

    The heads may be at different steps, as after a kill between two saves: those that are ahead wait. A head whose loss
    is not finite drops out, and the others continue.

    Args:
        parts: model, loss, optimizer and run of each head; the models share their features.
        feed: batches, and how models are validated.
        engine: device, precision and ranks.
        keep: called with a step once all heads are saved: the run can resume from that step.
        schedule: see `fit`.
        settings: of each head; `max_minutes` limits all heads together.

    Returns:
        The result of each head.

    Raises:
        Interrupted: by a signal; the first one waits for the end of the step. Any error saves the last completed step.
    """
    steps, val_every, accumulate, patience = (
        *(settings.steps, settings.val_every, settings.accumulate, settings.patience),
    )
    heads = [_Head(part, feed, engine, schedule, settings) for part in parts]
    going = [head for head in heads if head.goes_on(steps, patience)]
    first = min((head.run.step for head in going), default=steps)
    stream = feed.train_batches(start=first * accumulate)
    clock, every, limit = Stopwatch(engine.device), feed.epoch / accumulate, TimeLimit(settings.max_minutes, engine)
    with (
        deferred(NOTICE) as stop,
        _Together(heads, feed, engine, keep, stop) as together,
        closing(Meter(first, steps, val_every, every, engine.device, engine.is_main)) as meter,
    ):
        with limit.validating(), meter.validating():
            together.validate([head for head in heads if head.run.validation_pending])
        batches = meter.waiting(stream, feed.remedy)
        for step in range(first, planned := steps):
            going = [head for head in going if head.goes_on(planned, patience)]
            if not going or step >= (steps := limit.fit_steps(step, planned)):
                break
            logged, owed, kept = settings.due(step + 1, steps)
            learning = [head for head in going if head.run.step == step]
            with clock.running():
                drawn, pace = list(islice(batches, accumulate)), ScheduleState(schedule, step, steps)
                together.learn(learning, drawn, pace=pace, clip=settings.clip, logged=logged, owed=owed, kept=kept)
            done = [head for head in learning if head.dropped is None]
            if done:
                mean, rate = fmean(head.one.metrics.loss for head in done), max(head.rate for head in done)
                meter.step(done[0].learnt.images * engine.world, mean, rate)
            if logged:
                together.tell(meter.read())
            if any(head.asked for head in learning):
                stop.leave()
            if owed:
                with limit.validating(), meter.validating():
                    together.validate(learning)
            elif kept:
                together.save(learning)
    engine.wait()
    return [head.outcome(clock.read()) for head in heads]


class _Head:
    """A head in training, with the time that its own part of the steps takes, and whether it has dropped out."""

    learnt: StepOutput
    rate = 0.0
    asked = False  # whether any rank had a stop request at the last update
    dropped: str | None = None  # reason

    def __init__(
        self,
        parts: HeadParts,
        feed: ImageFeed,
        engine: Engine,
        schedule: Callable[[int, int], float],
        settings: Settings,
    ) -> None:
        model = parts.model
        self.name, self.folder, self.shared, self.clock = (
            parts.name,
            parts.folder,
            model.shared,
            Stopwatch(engine.device),
        )
        more = (schedule, engine, parts.checkpoints, parts.log, settings)
        self.one = HeadTraining(Experiment(model, parts.loss, feed, parts.optimizer, *more), self.name)
        self.run = self.one.run

    def goes_on(self, steps: int, patience: int | None) -> bool:
        """Return whether training continues: steps are left, and patience lasts or a validation is pending."""
        ended = self.dropped is not None or self.run.step >= steps
        return not ended and (self.run.validation_pending or not self.one.has_stalled(patience))

    def drop(self, error: NonFiniteLoss) -> None:
        """Stop training this head, and write the reason to `dropped.json`."""
        self.dropped = str(error)
        logger.warning("%s drops out, and the others go on. %s", self.name, error)
        if self.one.engine.is_main:
            write_json(self.folder / DROPPED, {"step": self.run.step, "reason": self.dropped})

    def is_saved(self) -> bool:
        """Return whether a run can resume in terms of this head: it has a `last` checkpoint or was dropped."""
        return self.dropped is not None or (self.folder / checkpoint.FOLDER / "last.safetensors").exists()

    def outcome(self, seconds: float) -> Outcome:
        """Return the result of the training; `seconds` is the duration of all steps."""
        return Outcome(self.run, self.clock.read() / seconds if seconds else None, self.dropped)


class _Together:
    """Steps, validations and saves of several heads; if its block ends early, their last steps are saved."""

    def __init__(
        self, heads: Sequence[_Head], feed: ImageFeed, engine: Engine, keep: Callable[[int], None], stop: Deferral
    ) -> None:
        self._heads, self._feed, self._engine, self._keep, self._stop = heads, feed, engine, keep, stop
        self._shared = heads[0].shared
        self._lasts = ExitStack()
        self._untold: list[tuple[_Head, StepOutput]] = []

    def __enter__(self) -> "_Together":
        for head in self._heads:
            self._lasts.enter_context(head.one.last)
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._lasts.__exit__(kind, error, trace)
        if error is not None:
            with suppress(UserError, OSError):  # report the first error
                self.tell({})
                self._note()

    def learn(self, heads: Sequence[_Head], drawn: Sequence[Any], **how: Any) -> None:
        """Train each head for one step on the same batches, whose features are computed once."""
        batches = [batch.to(self._engine.device) for batch in drawn]
        with self._shared.held(*(batch.image for batch in batches)):
            self._look(batches)  # outside the timers of the heads
            for head in heads:
                with head.clock.running():
                    self._step(head, iter(batches), **how)

    def _look(self, batches: Sequence[Any]) -> None:
        try:
            with self._engine.autocast():
                for batch in batches:
                    self._shared.of(batch.image)
        except (MemoryError, RuntimeError) as error:
            if not tells_shortage(error):  # in a shortage, each head splits its batches instead
                raise

    def _step(
        self, head: _Head, batches: Iterator[Any], *, pace: ScheduleState, clip: float | None, **due: bool
    ) -> None:
        try:
            head.learnt, head.rate = head.one.learn(batches, pace, counted=due["logged"])
            told, owed, asked = due["logged"] or due["kept"], due["owed"], self._stop.asked
            head.asked = head.one.update(head.learnt, clip=clip, owed=owed, asked=asked, told=told)
            if due["logged"]:
                self._untold.append((head, head.learnt))
        except NonFiniteLoss as error:
            head.drop(error)

    def tell(self, speed: dict[str, float]) -> None:
        """Log the last step of each head that took it."""
        for head, learnt in self._untold:
            head.one.tell(learnt, head.rate, speed)
        self._untold.clear()

    def validate(self, heads: Sequence[_Head]) -> None:
        """Score heads in one pass over the data, and save them."""
        heads = [head for head in heads if head.dropped is None]
        with ExitStack() as stack:
            scored = []
            for head in heads:
                stack.enter_context(head.one.as_scored())
                self._engine.seed(self._feed.seed, head.run.step)
                own = head.one.experiment
                scored.append(self._feed.scored(own.model, own.criterion, self._engine))
            # a resumed run starts with the pending validation
            with self._stop.at_once(allowed=self._engine.world == 1):
                found = self._feed.validate_each(scored, self._engine, sharing=self._shared.held) if scored else []
            judged = [self._judge(head, validation) for head, validation in zip(heads, found, strict=True)]
        for head, validation, progress in zip(heads, found, judged, strict=True):
            if progress is not None:
                head.one.settle(validation, progress)
        self.save(heads)

    def _judge(self, head: _Head, validation: Validation) -> Progress | None:
        try:
            return head.one.judge(validation)
        except NonFiniteLoss as error:
            head.drop(error)
            return None

    def save(self, heads: Sequence[_Head]) -> None:
        """Save heads, and report the step to resume from."""
        for head in heads:
            if head.dropped is None:
                head.one.save()
        self._note()

    def _note(self) -> None:
        """Report the step from which all heads can resume, once each can."""
        standing = [head.run.step for head in self._heads if head.dropped is None]
        if standing and all(head.is_saved() for head in self._heads):
            self._keep(min(standing))
