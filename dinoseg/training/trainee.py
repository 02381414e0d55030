"""A model in training: what a step and a validation do to it, and what is kept of it."""

import logging
import math
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dinoseg.core.contracts import Loss
from dinoseg.core.shapes import Prediction, mapped
from dinoseg.models.model import Segmenter, trained_names
from dinoseg.report.log import RunLog
from dinoseg.training.checkpoint import Checkpoints, Progress
from dinoseg.training.engine import Engine
from dinoseg.training.feed import Feed, Validation
from dinoseg.training.last_step import LastStep
from dinoseg.training.micro_batches import MicroBatches
from dinoseg.training.optim import MovingAverage, Pace, set_learning_rates, tensors_of
from dinoseg.training.rest import Rest
from dinoseg.training.tally import Tally
from dinoseg.utils.errors import UserError
from dinoseg.utils.interrupt import Deferral
from dinoseg.utils.precision import at_least_float32

logger = logging.getLogger(__name__)


class NonFiniteLoss(UserError):
    """The loss became infinite or not a number."""


@dataclass
class Learnt:
    """What the batches of a step came to on this rank; `mean` and `norm` are of all ranks, once they are read."""

    rate: float
    sums: list[Tensor]  # of loss times weight, and of weights
    names: list[str]  # of the samples
    images: int
    parts: dict[str, Tensor]  # of the last batch's loss
    tally: Tally | None
    mean: float = math.nan
    norm: float = math.nan


class Trainee:
    """A model in training, from where its checkpoint stands, with all that is its own.

    Args:
        model: a segmenter on the engine's device.
        loss: `loss(prediction, batch) -> (scalar, dict of scalars)`.
        feed: how it is validated, and the seed of its draws.
        optimizer: over `parameter_groups`.
        engine: device, precision and ranks.
        checkpoints: where the run stands, and where it is kept.
        log: scalars and pictures.
        accumulate: batches of a step.
        ema: decay of a moving average of the weights, which then is what gets scored and kept as best; or None.
        score: the score of a validation that decides which checkpoint is best.
        name: by which the log tells it from others.

    Attributes:
        run: where the run stands.
        last: saves the last whole step when its block ends early.
        mean: the loss of the newest step whose outcome was read.
        rest: of what begins to learn later.

    Raises:
        UserError: no validation has such a score, or the checkpoint does not fit.
    """

    def __init__(
        self,
        model: Segmenter,
        loss: Loss,
        feed: Feed,
        optimizer: Optimizer,
        engine: Engine,
        checkpoints: Checkpoints,
        log: RunLog,
        *,
        accumulate: int,
        ema: float | None,
        score: str,
        name: str = "",
    ) -> None:
        if score not in feed.score_names:
            raise UserError(f"trainer.score={score} is not a score. Choose one of {', '.join(feed.score_names)}.")
        self.model, self.loss, self.feed, self.optimizer = model, loss, feed, optimizer
        self.engine, self.checkpoints, self.log, self.score = engine, checkpoints, log, score
        self._named = name and f"{name}: "
        self.net = engine.prepare(model)
        self.average = MovingAverage(tensors_of(model, trained_names(model)), ema) if ema else None
        self.scale = engine.loss_scale()
        self.run: Progress = checkpoints.restore(model, optimizer, self.average, self.scale)
        self.last = LastStep(checkpoints, model, optimizer, self.average, self._whole, self.scale)
        self._unread: deque[tuple[int, Learnt, Outcome]] = deque()  # what steps came to, in the order of the steps
        self.mean = math.nan
        self.rest = Rest(model.backbone, optimizer, alone=engine.world == 1)
        self._micro = MicroBatches(
            engine,
            accumulate,
            model.head.least_batch,
            self.last.undo,
            several=bool(name),
            sums_over_batch=loss.sums_over_batch,
        )
        model.train()

    def has_stalled(self, patience: int | None) -> bool:
        """Return whether more validations than `patience` have brought no better score; say so."""
        stalled = patience is not None and self.run.stale > patience
        if stalled:
            named = self._named, self.run.stale, self.run.step
            logger.info("%sNo better score in %d validations: stopped at step %d.", *named)
        return stalled

    def seed_draws(self) -> None:
        """Let what is drawn at random from here on depend on the step alone."""
        self.engine.seed(self.feed.seed, self.run.step)

    def learn(self, batches: Iterator[Any], pace: Pace, *, counted: bool) -> Learnt:
        """Go backward through each batch of the next step.

        Args:
            batches: of this rank, from that step's first on.
            pace: of that step.
            counted: whether to tally what is predicted.

        Raises:
            OutOfMemory: there is too little for a single image.
        """
        self.seed_draws()
        rate = set_learning_rates(self.optimizer, pace)
        self.model.set_progress(pace.share)
        return self._micro.through(partial(self._gradients, pace, rate, counted), batches)

    def _gradients(self, pace: Pace, rate: float, counted: bool, batches: Iterable[Any], count: int) -> Learnt:
        """Go backward through each of `count` batches, and count what was predicted."""
        tally = self.feed.tally(self.engine) if counted else None
        batches, divisors = self._divisors(batches, count)
        sums = [torch.zeros((), device=self.engine.device)] * 2
        names, images = [], 0
        for number, drawn in enumerate(batches, start=1):
            batch = drawn.to(self.engine.device).taught(self._teach)
            with self.engine.accumulating(self.net, last=number == count), self.rest.during(pace, batch.image):
                prediction = self.net(batch.image)
                if self.scale is not None:  # sums over pixels overflow float16
                    prediction = mapped(prediction, cache(at_least_float32))
                part, weight, parts = self._loss_part(prediction, batch, divisors, count)
                if self.scale is not None and not self.scale.started:
                    self.scale.begin(self.engine.total(weight).item(), self.engine.device)
                self.engine.backward(part, self.scale)
            if tally is not None:
                tally.add(prediction, batch)
            sums = [sums[0] + part.detach(), sums[1] + weight]
            names += batch.names
            images += batch.count
        return Learnt(rate, sums, names, images, parts, tally)

    def _divisors(self, batches: Iterable[Any], count: int) -> tuple[Iterable[Any], Tensor | None]:
        """Return the `count` batches of a step, and the divisors (D,) of all ranks if the loss needs them first.

        A single divisor divides the gradients after the last batch instead.
        """
        if self.loss.num_divisors == 1 or count * self.engine.world == 1:
            return batches, None
        batches = list(batches)
        own = [self.loss.divisors(batch).to(self.engine.device, torch.float32) for batch in batches]
        return batches, self.engine.sum(torch.stack(own).sum(0))

    def _loss_part(
        self, prediction: Prediction, batch: Any, divisors: Tensor | None, count: int
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return what to go backward from, the weight by which the sum over all batches is divided, and named parts."""
        if divisors is not None:
            part, _, parts = self.loss.in_step(prediction, batch, divisors)
            return part, torch.full_like(part, 1 / (count * self.engine.world)), parts
        value, parts = self.loss(prediction, batch)
        weight = parts.get("weight", torch.full_like(value, len(batch.names)))
        if self.loss.num_divisors > 1:  # the one batch of the step
            weight = torch.ones_like(value)
        return value * weight, weight, parts

    @torch.no_grad()
    def _teach(self, images: Tensor) -> Prediction:
        """Predict for images (B, 3, H, W) as the moving average does, in eval mode: the same on each rank."""
        assert self.average is not None, "a teacher is a moving average: its regime asks for trainer.ema"
        with self.average.swapped():
            self.engine.align(self.model)  # each rank averages running means of its own
            self.model.eval()
            try:
                with self.engine.autocast():
                    return self.model(images)
            finally:
                self.model.train()

    def update(self, learnt: Learnt, *, clip: float | None, owed: bool, asked: int, told: bool = True) -> bool:
        """Update with the mean over all labels of the step, however they lay in batches and ranks.

        On CUDA, a step that is not `told` is read with the next one, so that nobody waits for the device. One that is
        not finite updates nothing there either, nor does the one after it.

        Args:
            learnt: of this step.
            clip: highest norm of the gradient, or None.
            owed: whether a validation is due after it.
            asked: not 0 if this rank is to stop.
            told: whether its loss and norm are to be known now; needed where anything is kept or logged after it.

        Returns:
            Whether any rank is to stop.

        Raises:
            NonFiniteLoss: of this step or the one before, before its update.
        """
        # ranks learn of a stop at the same step, and lose none when one of them is lost here: no update has begun
        total, weight, stop = self.engine.total(*learnt.sums, asked)
        with self.last.update():
            before = self._unread[-1][2].norm if self._unread else None
            mean, norm = self.engine.step(
                self.optimizer, total, weight, clip=clip, before=before, loss_scale=self.scale
            )
            self._unread.append((self.run.step, learnt, Outcome(mean, norm, stop)))
            told = told or not self.engine.updates_without_waiting(self.optimizer)
            stops = self._read(later=0 if told or (asked and self.engine.world == 1) else 1)
            if self.average is not None:
                self.average.update(self.run.step)
            self.run.step, self.run.owed = self.run.step + 1, owed
        return stops

    def tell(self, learnt: Learnt, speed: dict[str, float]) -> None:
        """Log a step: its loss, rate and gradient, how fast it went, what was tallied, and the terms of the loss."""
        row: dict[str, float | None] = {"train/loss": learnt.mean, "train/lr": learnt.rate}
        row |= {"train/gradient_norm": learnt.norm, **speed}
        row |= {} if learnt.tally is None else learnt.tally.read()
        if self.scale is not None and self.scale.started:
            row["train/loss_scale"] = self.scale.value.item()
        # of this rank's last batch
        row |= {f"train/{name}": value.item() for name, value in learnt.parts.items() if name != "weight"}
        self.log.scalars(self.run.step, row)

    def validate(self, stop: Deferral) -> None:
        """Score the model, log it, and keep it where it is the best yet."""
        self.seed_draws()
        with self.as_scored():
            with stop.at_once(allowed=self.engine.world == 1):  # a run that goes on begins with the validation it owes
                validation = self.feed.validate(self.model, self.loss, self.engine)
            judged = self.judge(validation)
        self.settle(validation, judged)

    @contextmanager
    def as_scored(self) -> Iterator[None]:
        """Let the model hold what is scored: its moving average, where there is one, and the first rank's buffers."""
        with self.average.swapped() if self.average is not None else nullcontext():
            self.engine.align(self.model)  # each rank averages running means of its own
            yield

    def judge(self, validation: Validation) -> Progress:
        """Keep the model `as_scored` if it is the best yet; return where the run stands with that.

        Raises:
            UserError: the score is undefined; NonFiniteLoss: it is no number.
        """
        value = validation.scores[self.score]
        if value is None:
            raise UserError(
                f"trainer.score={self.score} is undefined: the validation data has nothing to count for it."
            )
        if not math.isfinite(value):
            raise NonFiniteLoss(
                f"val/{self.score} is {value} at step {self.run.step}: no checkpoint can be chosen by it. Give a lower "
                "optim.optimizer.lr, or look at the validation data."
            )
        return self.checkpoints.judge(self.model, value, lowest=self.score in self.feed.lowest)

    def settle(self, validation: Validation, judged: Progress) -> None:
        """Log a validation, and take over what `judge` has returned of it."""
        step, scores = self.run.step, validation.scores
        self.log.pictures(step, validation.pictures)
        # last: where something fails before it, the validation comes again
        self.log.scalars(step, {f"val/{name}": value for name, value in scores.items() if isinstance(value, float)})
        self.checkpoints.settle(judged)
        logger.info(
            "%sstep %d: val/%s %.4f (best %.4f at step %d)",
            self._named,
            step,
            self.score,
            scores[self.score],
            self.run.best,
            self.run.best_step,
        )

    def save(self) -> None:
        """Save `last`."""
        self.checkpoints.save(self.model, self.optimizer, self.average, self.scale)

    def _read(self, later: int = 0) -> bool:
        """Take in what the steps came to, but for the newest `later` of them; return whether any rank is to stop."""
        stops = False
        while len(self._unread) > later:
            step, learnt, outcome = self._unread[0]  # where it is not finite it stays, so that nothing is saved
            learnt.mean, learnt.norm, asked = outcome.read()
            if not math.isfinite(learnt.norm):
                raise self._diverged(step, learnt)
            self._unread.popleft()
            self.mean, stops = learnt.mean, stops or asked > 0
        return stops

    def _whole(self) -> bool:
        """Return whether each update so far was one, for when training ends early: other ranks are not asked."""
        for step, _, outcome in self._unread:
            if not math.isfinite(outcome.read()[1]):
                logger.error("The loss of step %d was not finite: nothing is saved.", step)
                return False
        return True

    def _diverged(self, step: int, learnt: Learnt) -> NonFiniteLoss:
        everywhere = self.engine.gather(learnt.names)
        other = ", choose engine.precision=fp32 (float16 ends at 65504)" if self.scale is not None else ""
        return NonFiniteLoss(
            f"Step {step}: the loss is {learnt.mean:g} and the gradient norm {learnt.norm:g}, so training "
            f"stops before the update. The samples were {', '.join(everywhere)}. What was saved before is untouched: "
            f"give a lower optim.optimizer.lr, set trainer.clip{other}, or look at these samples."
        )


class Outcome:
    """The loss of a step, the norm of its gradient, and how many ranks are asked to stop: () each, to be read later.

    From CUDA they are copied while the next step is prepared, so that who reads them then waits for nothing.
    """

    def __init__(self, loss: Tensor, norm: Tensor, asked: Tensor) -> None:
        self.norm = norm
        self._copied: torch.cuda.Event | None = None
        values = self._host = torch.stack([loss, norm, asked.to(norm.device).to(norm.dtype)])
        if values.device.type == "cuda":
            self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._host.copy_(values, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> list[float]:
        """Return them, once the device has come to the end of their step."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._host.tolist()
