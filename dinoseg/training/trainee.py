"""Training state of one model: gradients, optimizer updates, validation and checkpoints."""

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
    """Error raised when the loss, the gradient norm or the validation score is not finite."""


@dataclass
class Learnt:
    """Result of the forward and backward passes of one step on this rank.

    `mean` and `norm` cover all ranks; they are NaN until the outcome of the step is read.
    """

    rate: float
    sums: list[Tensor]  # sum of loss times weight, and sum of weights
    names: list[str]  # of the samples of the step
    images: int
    parts: dict[str, Tensor]  # named parts of the last batch's loss
    tally: Tally | None
    mean: float = math.nan
    norm: float = math.nan


class Trainee:
    """A model in training, resumed from its checkpoint, with its optimizer, moving average and progress.

    Args:
        model: a segmenter on the engine's device.
        loss: `loss(prediction, batch) -> (scalar, dict of scalars)`.
        feed: validation, training tally and random seed.
        optimizer: over `parameter_groups`.
        engine: device, precision and ranks.
        checkpoints: progress and checkpoint files of the run.
        log: receives scalars and images.
        accumulate: batches per optimizer step.
        ema: decay of a moving average of the weights, which is then scored and saved as best; or None.
        score: validation score that selects the best checkpoint.
        name: prefix of log messages when several models are trained; empty: none.

    Attributes:
        run: progress of the run.
        last: emergency checkpoint, which saves the last completed step when its block ends early.
        mean: loss of the newest step whose outcome was read.
        rest: freezes trained parts of the backbone at the start of the training.

    Raises:
        UserError: the feed has no score of that name, or the checkpoint does not fit.
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
        self._unread: deque[tuple[int, Learnt, Outcome]] = deque()  # oldest first
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
        """Return whether more than `patience` validations have passed without a better score; if so, log it."""
        stalled = patience is not None and self.run.stale > patience
        if stalled:
            named = self._named, self.run.stale, self.run.step
            logger.info("%sNo better score in %d validations: stopped at step %d.", *named)
        return stalled

    def seed_draws(self) -> None:
        """Seed the random generators from the feed's seed and the current step, independently of previous steps."""
        self.engine.seed(self.feed.seed, self.run.step)

    def learn(self, batches: Iterator[Any], pace: Pace, *, counted: bool) -> Learnt:
        """Run the forward and backward passes of the next step.

        Args:
            batches: this rank's batches, from the first one of the step.
            pace: schedule state of the step.
            counted: whether to tally the predictions.

        Raises:
            OutOfMemory: a batch does not fit in memory and cannot be split further.
        """
        self.seed_draws()
        rate = set_learning_rates(self.optimizer, pace)
        self.model.set_progress(pace.share)
        return self._micro.through(partial(self._gradients, pace, rate, counted), batches)

    def _gradients(self, pace: Pace, rate: float, counted: bool, batches: Iterable[Any], count: int) -> Learnt:
        """Run the forward and backward passes of `count` batches, and tally the predictions if `counted`."""
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
        """Return the `count` batches of a step, and the loss divisors (D,) of all ranks if they are needed in advance.

        They are not if the loss has a single divisor, which divides the gradients after the last batch. Nor are they
        if the step consists of a single batch.
        """
        if self.loss.num_divisors == 1 or count * self.engine.world == 1:
            return batches, None
        batches = list(batches)
        own = [self.loss.divisors(batch).to(self.engine.device, torch.float32) for batch in batches]
        return batches, self.engine.sum(torch.stack(own).sum(0))

    def _loss_part(
        self, prediction: Prediction, batch: Any, divisors: Tensor | None, count: int
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return the tensor to backpropagate, its weight and the named parts of the loss.

        The sum of these tensors over all batches is divided by the sum of the weights.
        """
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
        """Predict for images (B, 3, H, W) with the moving average in eval mode; the result is the same on each rank."""
        assert self.average is not None, "a teacher is a moving average: its regime asks for trainer.ema"
        with self.average.swapped():
            self.engine.align(self.model)  # running means differ between ranks
            self.model.eval()
            try:
                with self.engine.autocast():
                    return self.model(images)
            finally:
                self.model.train()

    def update(self, learnt: Learnt, *, clip: float | None, owed: bool, asked: int, told: bool = True) -> bool:
        """Update the weights with the mean gradient over all labels of the step, across its batches and ranks.

        On CUDA, the outcome of a step with `told=False` is read one step later, so that the host does not wait for the
        device. If it is not finite, neither this step nor the next one changes the weights.

        Args:
            learnt: result of the step's forward and backward passes.
            clip: maximum gradient norm, or None.
            owed: whether a validation is due after the step.
            asked: non-zero if this rank has a stop request.
            told: whether to read loss and norm now; required if anything is saved or logged after the step.

        Returns:
            Whether any rank has a stop request.

        Raises:
            NonFiniteLoss: of this step or the previous one, before its update.
        """
        # all ranks see a stop request at the same step; a rank that fails here costs no step, as no update has begun
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
        """Log a step: loss, learning rate, gradient norm, speed, tallied scores and loss terms."""
        row: dict[str, float | None] = {"train/loss": learnt.mean, "train/lr": learnt.rate}
        row |= {"train/gradient_norm": learnt.norm, **speed}
        row |= {} if learnt.tally is None else learnt.tally.read()
        if self.scale is not None and self.scale.started:
            row["train/loss_scale"] = self.scale.value.item()
        # parts of the loss of this rank's last batch
        row |= {f"train/{name}": value.item() for name, value in learnt.parts.items() if name != "weight"}
        self.log.scalars(self.run.step, row)

    def validate(self, stop: Deferral) -> None:
        """Score the model, log the scores, and save the model if it is the best so far."""
        self.seed_draws()
        with self.as_scored():
            with stop.at_once(allowed=self.engine.world == 1):  # a resumed run starts with the pending validation
                validation = self.feed.validate(self.model, self.loss, self.engine)
            judged = self.judge(validation)
        self.settle(validation, judged)

    @contextmanager
    def as_scored(self) -> Iterator[None]:
        """Swap in the tensors that are scored: the moving average, if there is one, and rank 0's buffers."""
        with self.average.swapped() if self.average is not None else nullcontext():
            self.engine.align(self.model)  # running means differ between ranks
            yield

    def judge(self, validation: Validation) -> Progress:
        """Save the model as `best` if its score is the best so far, and return the updated progress.

        The model has to be in the state of `as_scored`.

        Raises:
            UserError: the score is undefined.
            NonFiniteLoss: the score is not finite.
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
        """Log a validation, and commit the progress that `judge` returned for it."""
        step, scores = self.run.step, validation.scores
        self.log.pictures(step, validation.pictures)
        # last: if anything fails before, the resumed run repeats the validation
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
        """Save the `last` checkpoint."""
        self.checkpoints.save(self.model, self.optimizer, self.average, self.scale)

    def _read(self, later: int = 0) -> bool:
        """Read the outcomes of all but the newest `later` steps; return whether any rank has a stop request."""
        stops = False
        while len(self._unread) > later:
            step, learnt, outcome = self._unread[0]  # not removed if not finite, so that nothing is saved
            learnt.mean, learnt.norm, asked = outcome.read()
            if not math.isfinite(learnt.norm):
                raise self._diverged(step, learnt)
            self._unread.popleft()
            self.mean, stops = learnt.mean, stops or asked > 0
        return stops

    def _whole(self) -> bool:
        """Return whether all unread steps are finite, without communication: for a training that ends early."""
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
    """Loss, gradient norm and number of stop requests of a step, () each, to be read later.

    On CUDA they are copied to pinned memory while the next step is prepared, so that reading them takes no time.
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
        """Return the loss, the norm and the number of stop requests once the device has completed the step."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._host.tolist()
