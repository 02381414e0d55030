"""The training loop, and what it does besides the steps: validation, log rows, labels of a teacher."""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from dinoseg.core.contracts import Loss
from dinoseg.core.shapes import Prediction
from dinoseg.models.model import Segmenter
from dinoseg.report.log import RunLog
from dinoseg.training.checkpoint import Checkpoints, Progress
from dinoseg.training.emergency import EmergencyCheckpoint
from dinoseg.training.engine import Engine
from dinoseg.training.feed import Feed
from dinoseg.training.freeze import BackboneFreeze
from dinoseg.training.loss_scale import LossScale, widened
from dinoseg.training.meter import Meter
from dinoseg.training.micro_batches import MicroBatches
from dinoseg.training.optim import MovingAverage, ScheduleState, build_ema, set_learning_rates
from dinoseg.training.step import BatchLoss, MetricsQueue, NonFiniteLoss, StepMetrics, StepOutput, batch_loss
from dinoseg.training.time_limit import TimeLimit
from dinoseg.utils.errors import UserError
from dinoseg.utils.interrupt import Deferral, deferred
from dinoseg.utils.ranges import Count, Natural, OpenShare, Positive

logger = logging.getLogger(__name__)
NOTICE = "stopping: `last` is saved after this step (a second signal ends it at once, unsaved)"


class Due(NamedTuple):
    """What follows a step."""

    log: bool
    validation: bool
    save: bool


@dataclass(frozen=True)
class Settings:
    """Settings of the training loop.

    Args:
        steps: optimizer steps in all.
        val_every: steps between validations; the last step validates too.
        save_every: steps between saves in addition to those at each validation; or None.
        log_every: steps between logged rows.
        accumulate: batches per optimizer step.
        clip: maximum gradient norm, or None.
        patience: stop after more validations than this without a better score, or None.
        ema: decay of a moving average of the weights, which is then scored and saved as best; or None.
        score: validation score that selects the best checkpoint.
        max_minutes: wall-clock limit, for which steps that take too long are dropped, see `TimeLimit`; or None.
    """

    steps: Count
    val_every: Count
    save_every: Count | None = None
    log_every: Count = 10
    accumulate: Count = 1
    clip: Positive | None = 1.0
    patience: Natural | None = None
    ema: OpenShare | None = None
    score: str = "miou"
    max_minutes: Positive | None = None

    def due(self, step: int, steps: int) -> Due:
        """Return what is due after this many steps of a training that ends after `steps`."""
        log, validation, save = (
            every is not None and (step % every == 0 or step == steps)
            for every in (self.log_every, self.val_every, self.save_every)
        )
        return Due(log, validation, save or validation)


@dataclass(frozen=True)
class Experiment:
    """All parts of a training.

    Args:
        model: a segmenter on the engine's device.
        criterion: `criterion(prediction, batch) -> (scalar, dict of scalars)`.
        data: batches, and how the model is validated.
        optimizer: over `parameter_groups`.
        schedule: `schedule(step, steps)`, multiplier of the base learning rates.
        engine: device, precision and ranks.
        checkpoints: progress and checkpoint files of the run.
        log: receives scalars and images.
        settings: length, intervals and options.
    """

    model: Segmenter
    criterion: Loss
    data: Feed
    optimizer: Optimizer
    schedule: Callable[[int, int], float]
    engine: Engine
    checkpoints: Checkpoints
    log: RunLog
    settings: Settings


def fit(experiment: Experiment) -> Progress:
    """Train from where the checkpoint stands until all steps are done, and return the progress of the run.

    Raises:
        UserError: `settings.score` is unknown, or the checkpoint does not fit.
        NonFiniteLoss: with the step and the samples; no step is saved then, since the last ones led to it.
        Interrupted: by a signal; the first one waits for the end of the step. This and any other error except
            `NonFiniteLoss` save the last completed step.
    """
    model, criterion, data = experiment.model, experiment.criterion, experiment.data
    optimizer, engine, settings = experiment.optimizer, experiment.engine, experiment.settings
    check_score(data, settings.score)
    net, ema, scale = engine.prepare(model), build_ema(model, settings.ema), engine.loss_scale()
    state = (model, optimizer, ema, scale)
    progress, save_last = experiment.checkpoints.restore(*state), partial(experiment.checkpoints.save, *state)
    metrics, limit = MetricsQueue(engine, optimizer), TimeLimit(settings.max_minutes, engine)
    emergency = EmergencyCheckpoint(experiment.checkpoints, *state, metrics.are_finite)
    freeze = BackboneFreeze(model.backbone, optimizer, is_single=engine.world == 1)
    ready, smallest = partial(on_device, experiment, ema), model.head.least_batch
    micro = MicroBatches(engine, criterion, settings.accumulate, smallest=smallest, prepare=ready, undo=emergency.undo)
    stream, epoch = data.train_batches(start=progress.step * settings.accumulate), data.epoch / settings.accumulate
    meter = Meter(progress.step, settings.steps, settings.val_every, epoch, engine.device, engine.is_main)
    loss: BatchLoss | None
    model.train()
    with deferred(NOTICE) as stop, emergency, closing(meter):
        if progress.validation_pending:
            with limit.validating(), meter.validating():
                validate(experiment, ema, stop)
            save_last()
        freeze.log_length(ScheduleState(experiment.schedule, progress.step, settings.steps))
        batches = meter.waiting(stream, data.remedy)
        for step in range(progress.step, settings.steps):
            if has_stalled(progress, settings.patience):
                break
            steps = limit.fit_steps(step, settings.steps, frozen_until=freeze.until)
            if step >= steps:
                break
            position, due = ScheduleState(experiment.schedule, step, steps), settings.due(step + 1, steps)
            engine.seed(data.seed, step)
            rate = set_learning_rates(optimizer, position)
            model.set_progress(position.share)
            output = StepOutput(engine.device, partial(data.tally, engine) if due.log else None)
            for batch in micro.of_step(batches, output):
                with micro.retried(), engine.sync(net, micro.is_last), freeze.during(position, batch.image):
                    prediction = net(batch.image) if scale is None else widened(net(batch.image))
                    loss = batch_loss(criterion, prediction, batch, micro.divisors, micro.num_batches)
                    engine.backward(loss.total, scale, loss.weight)
                    output.add(loss, prediction, batch)
                prediction = loss = None  # frees the graph
            # all ranks see a stop request at the same step; a rank that fails here costs no step
            total, weight, stops = engine.total(*output.sums, stop.asked)
            with emergency.updating():
                mean, norm = engine.optimizer_step(
                    optimizer, total, weight, clip=settings.clip, before=metrics.newest_norm, loss_scale=scale
                )
                values = StepMetrics(step, output.names, mean, norm, stops)
                is_stopping = metrics.add(values, read=due.log or due.save, stop_requested=stop.asked > 0)
                if ema is not None:
                    ema.update(step)
                progress.step, progress.validation_pending = step + 1, due.validation
            meter.step(output.images * engine.world, metrics.loss, rate)
            if freeze.ends_with(position):
                meter.change()
            if due.log:
                log_step(experiment.log, progress.step, output, metrics, rate, scale, meter.read())
            if is_stopping:
                stop.leave()
            if due.validation:
                with limit.validating(), meter.validating():
                    validate(experiment, ema, stop)
            if due.save:
                save_last()
    engine.wait()
    return progress


def check_score(data: Feed, score: str) -> None:
    """Refuse a score that the validation does not compute."""
    if score not in data.score_names:
        raise UserError(f"trainer.score={score} is not a score. Choose one of {', '.join(data.score_names)}.")


def on_device(experiment: Experiment, ema: MovingAverage | None, batch: Any) -> Any:
    """Return a batch on the device; the moving average of the model labels images without masks."""
    return batch.to(experiment.engine.device).taught(partial(teach, experiment, ema))


@torch.no_grad()
def teach(experiment: Experiment, ema: MovingAverage | None, images: Tensor) -> Prediction:
    """Predict for images (B, 3, H, W) with the moving average in eval mode; the result is the same on each rank."""
    assert ema is not None, "the teacher is a moving average: its task requires trainer.ema"
    model, engine = experiment.model, experiment.engine
    with scored_weights(model, ema, engine):
        model.eval()
        try:
            with engine.autocast():
                return model(images)
        finally:
            model.train()


@contextmanager
def scored_weights(model: Segmenter, ema: MovingAverage | None, engine: Engine) -> Iterator[None]:
    """Swap in the tensors that are scored: the moving average, if there is one, and rank 0's buffers."""
    with ema.swapped() if ema is not None else nullcontext():
        engine.broadcast_buffers(model)  # running means differ between ranks
        yield


def has_stalled(progress: Progress, patience: int | None) -> bool:
    """Return whether more than `patience` validations have passed without a better score; if so, log it."""
    stalled = patience is not None and progress.stale > patience
    if stalled:
        logger.info("No better score in %d validations: stopped at step %d.", progress.stale, progress.step)
    return stalled


def log_step(
    log: RunLog,
    step: int,
    output: StepOutput,
    metrics: MetricsQueue,
    rate: float,
    scale: LossScale | None,
    speed: dict[str, float],
) -> None:
    """Log the newest step: loss, learning rate, gradient norm, speed, tallied scores and loss terms."""
    row: dict[str, float | None] = {"train/loss": metrics.loss, "train/lr": rate}
    row |= {"train/gradient_norm": metrics.norm, **speed}
    row |= {} if output.tally is None else output.tally.read()
    if scale is not None and scale.started:
        row["train/loss_scale"] = scale.value.item()
    # parts of the loss of this rank's last batch
    row |= {f"train/{name}": value.item() for name, value in output.parts.items() if name != "weight"}
    log.scalars(step, row)


def validate(experiment: Experiment, ema: MovingAverage | None, stop: Deferral) -> None:
    """Score the model, log the scores, and save the model if it is the best so far.

    Raises:
        UserError: the score is undefined.
        NonFiniteLoss: the score is not finite.
    """
    model, data, engine = experiment.model, experiment.data, experiment.engine
    checkpoints, name = experiment.checkpoints, experiment.settings.score
    progress = checkpoints.progress
    engine.seed(data.seed, progress.step)
    with scored_weights(model, ema, engine):
        with stop.at_once(allowed=engine.world == 1):  # a resumed run starts with the pending validation
            scores, pictures = data.validate(model, experiment.criterion, engine)
        score = finite_score(scores[name], name, progress.step)
        judged = checkpoints.save_if_best(model, score, lowest=name in data.lowest)
    experiment.log.pictures(progress.step, pictures)
    # last: if anything fails before, the resumed run repeats the validation
    values = {f"val/{key}": value for key, value in scores.items() if isinstance(value, float)}
    experiment.log.scalars(progress.step, values)
    checkpoints.commit(judged)
    best = progress.best, progress.best_step
    logger.info("step %d: val/%s %.4f (best %.4f at step %d)", progress.step, name, score, *best)


def finite_score(score: float | None, name: str, step: int) -> float:
    """Return a validation score if the best checkpoint can be chosen by it.

    Raises:
        UserError: it is undefined.
        NonFiniteLoss: it is not finite.
    """
    if score is None:
        raise UserError(f"trainer.score={name} is undefined: the validation data has nothing to count for it.")
    if not math.isfinite(score):
        raise NonFiniteLoss(
            f"val/{name} is {score} at step {step}: no checkpoint can be chosen by it. Give a lower "
            "optim.optimizer.lr, or look at the validation data."
        )
    return score
