"""The training loop, and its tasks besides the steps: validation and log rows."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any, Literal, NamedTuple

from torch.optim import Optimizer

from dinoseg.core.contracts import Loss
from dinoseg.core.metric import FINITE_MEAN, INFINITE_IMAGES, RowMetric, find_infinite_score, split_infinite
from dinoseg.models.model import SegmentationModel
from dinoseg.report.log import RunLog
from dinoseg.training.checkpoint import Checkpointer, EmergencyCheckpoint, Progress
from dinoseg.training.data_module import DataModule
from dinoseg.training.engine import Engine
from dinoseg.training.freeze import build_freeze
from dinoseg.training.loss_scale import LossScale, widen_predictions
from dinoseg.training.meter import Meter
from dinoseg.training.micro_batches import MicroBatches
from dinoseg.training.optim import MovingAverage, Schedule, build_ema, set_learning_rates
from dinoseg.training.step import BatchLoss, MetricsQueue, NonFiniteLoss, StepMetrics, StepOutput, batch_loss
from dinoseg.training.time_limit import TimeLimit
from dinoseg.utils.errors import UserError
from dinoseg.utils.interrupt import Deferral, defer_signals
from dinoseg.utils.ranges import Count, OpenShare, Positive
from dinoseg.utils.wording import count_of

logger = logging.getLogger(__name__)
NOTICE = "stopping: `last` is saved after this step (a second signal ends it at once, unsaved)"


class Due(NamedTuple):
    """Actions that are due after a step."""

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
        patience: stop after this many validations without a better score, as in Keras and Lightning; or None.
        ema: decay of a moving average of the weights, which is then scored and saved as best; or None.
        score: validation score that selects the best checkpoint.
        evaluate: `best` or `last`: validated weights that the run is evaluated with, and that are saved as best.
        max_minutes: wall-clock limit, for which steps that take too long are dropped, see `TimeLimit`; or None.
    """

    steps: Count
    val_every: Count
    save_every: Count | None = None
    log_every: Count = 10
    accumulate: Count = 1
    clip: Positive | None = 1.0
    patience: Count | None = None
    ema: OpenShare | None = None
    score: str = "miou"
    evaluate: Literal["best", "last"] = "best"
    max_minutes: Positive | None = None

    def due(self, step: int, steps: int) -> Due:
        """Return what is due after this many steps of a training that ends after `steps`."""
        log, validation, save = (
            every is not None and (step % every == 0 or step == steps)
            for every in (self.log_every, self.val_every, self.save_every)
        )
        return Due(log, validation, save or validation)


@dataclass(frozen=True)
class TrainingSetup:
    """All parts of a training.

    Args:
        model: a segmenter on the engine's device.
        criterion: `criterion(prediction, batch) -> (scalar, dict of scalars)`.
        data: batches, and how the model is validated.
        optimizer: over `parameter_groups`.
        schedule: multiplier of the base learning rates.
        engine: device, precision and ranks.
        checkpoints: progress and checkpoint files of the run.
        log: receives scalars and images.
        settings: length, intervals and options.
        make_ema: makes the moving average of the weights from the prepared model and `settings.ema`.
    """

    model: SegmentationModel
    criterion: Loss
    data: DataModule
    optimizer: Optimizer
    schedule: Schedule
    engine: Engine
    checkpoints: Checkpointer
    log: RunLog
    settings: Settings
    make_ema: Callable[[SegmentationModel, float | None], MovingAverage | None] = build_ema

    def __post_init__(self) -> None:
        """Refuse a score that selects no checkpoint; which scores do depends on the data, too.

        Raises:
            UserError: the score is unknown, or counts only some of the images.
        """
        if not selects_checkpoints(self.settings.score, self.data.score_names):
            raise explain_score(self.settings.score, self.data.score_names)


def fit(setup: TrainingSetup) -> Progress:
    """Train from where the checkpoint stands until all steps are done, and return the progress of the run.

    Raises:
        UserError: the checkpoint does not fit.
        NonFiniteLoss: with the step and the samples; no step is saved then, since the last ones led to it.
        Interrupted: by a signal; the first one waits for the end of the step. This and any other error except
            `NonFiniteLoss` save the last completed step.
    """
    model, criterion, optimizer = setup.model, setup.criterion, setup.optimizer
    data, engine, settings = setup.data, setup.engine, setup.settings
    net = engine.prepare(model)
    # each of these is None in a training without it
    ema = setup.make_ema(model, settings.ema)
    scale = engine.loss_scale()
    freeze = build_freeze(model.backbone, optimizer, is_single=engine.world_size == 1)
    frozen_until = 0.0 if freeze is None else freeze.until
    limit = None if settings.max_minutes is None else TimeLimit(settings.max_minutes, engine, frozen_until=frozen_until)
    # a training of the head, then one of the whole model, each with a schedule of its own (LP-FT, Kumar et al., arXiv
    # 2202.10054)
    schedule = setup.schedule if freeze is None else freeze.restart(setup.schedule)
    state = (model, optimizer, ema, scale)
    progress = setup.checkpoints.restore(*state)
    # on CUDA the loss of a step is read one step later: reading it at once would leave the device idle
    metrics = MetricsQueue(engine, optimizer)
    # saves the newest complete step, however the loop ends; `undo` reverts one that ran out of memory
    emergency = EmergencyCheckpoint(setup.checkpoints, *state, metrics.are_finite)
    micro = MicroBatches(engine, criterion, model.head.min_batch_size, settings.accumulate, undo=emergency.undo)
    epoch = data.epoch / settings.accumulate
    meter = Meter(progress.step, settings.steps, settings.val_every, epoch, engine.device, engine.is_main, limit=limit)
    # order and views are functions of (seed, epoch, sample), so a resumed run only needs the number of its next batch
    stream = meter.measure_waits(data.train_batches(start=progress.step * settings.accumulate), lambda: data.remedy)
    loss: BatchLoss | None
    model.train()
    # closing the stream ends the loading processes; the emergency checkpoint is saved before
    with defer_signals(NOTICE) as stop, closing(stream), emergency, closing(meter):
        # the run was stopped between an update and its validation
        if progress.validation_pending:
            with meter.measure_validation():
                validate(setup, ema, stop)
            setup.checkpoints.save(*state)
        if freeze is not None:
            freeze.log_length(progress.step, settings.steps)
        for step in range(progress.step, settings.steps):
            # a wall-clock limit shortens the schedule with the training, so that the rate still falls to its end
            steps = settings.steps if limit is None else limit.fit_steps(step, settings.steps)
            if step >= steps or is_out_of_patience(progress, settings.patience):
                break
            due = settings.due(step + 1, steps)
            # dropout is a function of (seed, step, rank), so a checkpoint needs no random state
            engine.seed(data.seed, step)
            # a function of the step: accelerate's scheduler takes one step per rank, so that two ranks halve the
            # schedule
            rate = set_learning_rates(optimizer, schedule, step, steps)
            # heads that anneal something, such as EoMT its attention masks
            model.set_progress(step, steps)
            output = StepOutput(engine.device, partial(data.step_scores, engine) if due.log else None)
            # after an out-of-memory error it yields the same samples again, in batches of half the size
            for batch in micro.split_step(stream, output):
                # ranks average their gradients in the last backward pass only: the earlier ones would be averaged in
                # vain
                with micro.retry_batch(), engine.sync(net, micro.is_last):
                    batch = batch.to(engine.device)
                    with freeze.apply(step, steps, batch.image) if freeze else nullcontext():
                        # in the engine's precision: `Engine.prepare` has wrapped its forward pass in autocast
                        prediction = net(batch.image) if scale is None else widen_predictions(net(batch.image))
                        # a sum, since only the end of a step shows how many labels it has on all ranks; a mean over
                        # each batch would give labels more weight where a batch has few
                        loss = batch_loss(criterion, prediction, batch, micro.divisors, micro.num_batches)
                        engine.backward(loss.total, scale, loss.weight)
                    output.add(loss, prediction, batch)
                # else the graph's activations would stay in memory while the next forward pass allocates its own
                batch = prediction = loss = None
            # all ranks see a stop request at the same step; a rank that fails here costs no step
            total, weight, stops = engine.total(output.total, output.weight, stop.signal)
            # weights, optimizer, average and progress change together: an error in this block leaves no step to save
            with emergency.mark_update():
                mean, norm = engine.optimizer_step(
                    optimizer, total, weight, clip=settings.clip, previous_norm=metrics.newest_norm, loss_scale=scale
                )
                # `norm` is that before clipping; a step that is not finite has updated nothing
                values = StepMetrics(step + 1, output.names, mean, norm, stops)
                # what is logged or saved after this step has to be known as finite, so it waits for the device
                is_stopping = metrics.add(values, read=due.log or due.save, stop_requested=stop.signal > 0)
                if ema is not None:
                    ema.update(step)
                # set before the validation runs: if that is interrupted, the resumed run starts with it
                progress.step = step + 1
                progress.validation_pending = due.validation
            meter.step(output.images * engine.world_size, metrics.loss, rate)
            if due.log:
                log_step(setup, output, metrics, scale, rate, meter.read())
            # raises: the emergency checkpoint saves this step, and a resumed run makes up its validation
            if is_stopping:
                stop.leave()
            if due.validation:
                with meter.measure_validation():
                    validate(setup, ema, stop)
            # after the validation, whose progress (best score, patience) the file holds too
            if due.save:
                setup.checkpoints.save(*state)
    # the final evaluation reads files on every rank, which rank 0 may still be writing
    engine.wait()
    return progress


def is_out_of_patience(progress: Progress, patience: int | None) -> bool:
    """Return whether `patience` validations in a row had no better score, and log the early stop."""
    if patience is None or progress.stale < patience:
        return False
    logger.info("No better score in %d validations: early stopping at step %d.", progress.stale, progress.step)
    return True


def selects_checkpoints(score: str, names: Sequence[str]) -> bool:
    """Return whether a score can select the best checkpoint: it is one of a validation's, and counts all images."""
    return score in names and find_infinite_score(score, names) is None


def explain_score(
    score: str, names: Sequence[str], metrics: Sequence[str] = (), chosen: Mapping[str, RowMetric] | None = None
) -> UserError:
    """Return the error of a score that selects no checkpoint.

    Args:
        score: `trainer.score`.
        names: scores of the validation.
        metrics: options of the config group `metric`, which add scores.
        chosen: metrics of the chosen options.
    """
    if whole := find_infinite_score(score, names):
        return UserError(
            f"trainer.score={score} counts only some of the images. Set trainer.score={whole}: it selects the fewest "
            f"infinite images, then the best {whole}{FINITE_MEAN}."
        )
    selecting = [name for name in names if selects_checkpoints(name, names)]
    if chosen and score in chosen:
        found = ", ".join(name for name in chosen[score].scores if name in selecting)
        return UserError(f"trainer.score={score} is not a score: metric={score} has {found}. Choose one of these.")
    if score in metrics:
        return UserError(f"trainer.score={score} is the score of a metric that is not chosen. Add metric=[{score}].")
    further = [name for name in metrics if name not in names]
    remedy = f"; metric=[NAME] adds {', '.join(further)}" if further else ""
    return UserError(f"trainer.score={score} is not a score. Choose one of {', '.join(selecting)}{remedy}.")


def log_step(
    setup: TrainingSetup,
    output: StepOutput,
    metrics: MetricsQueue,
    scale: LossScale | None,
    rate: float,
    speed: dict[str, float],
) -> None:
    """Log the newest step: loss, highest learning rate, gradient norm, speed, tallied scores and loss terms."""
    row: dict[str, float | None] = {
        "train/loss": metrics.loss,
        "train/lr": rate,
        "train/gradient_norm": metrics.norm,
        **speed,
    }
    if scale is not None and scale.started:
        row["train/loss_scale"] = scale.value.item()
    # parts of the loss of this rank's last batch
    row |= {f"train/{name}": value.item() for name, value in output.parts.items() if name != "weight"}
    try:
        if output.scores is not None:
            row |= output.scores.read()
    finally:  # if another rank has died: this step is saved, and a resumed run does not log it again
        setup.log.scalars(setup.checkpoints.progress.step, row)


def validate(setup: TrainingSetup, ema: MovingAverage | None, stop: Deferral) -> None:
    """Score the model, log the scores, and save it if it is the best so far.

    Raises:
        UserError: the score is undefined.
        NonFiniteLoss: the score is not finite.
    """
    model, data, engine = setup.model, setup.data, setup.engine
    checkpoints, log = setup.checkpoints, setup.log
    step = checkpoints.progress.step
    # a validation that a resumed run repeats draws the same numbers
    engine.seed(data.seed, step)
    began = perf_counter()
    # the weights that are scored are those that `best` stores
    with ema.use_average() if ema is not None else nullcontext():
        engine.broadcast_buffers(model)  # running means differ between ranks
        with stop.at_once(allowed=engine.world_size == 1):  # a resumed run starts with the pending validation
            scores, pictures = data.validate(model, setup.criterion, engine)
        progress = save_if_best(setup, scores)
    log.images(step, pictures)
    # last: if anything fails before, the resumed run repeats the validation
    is_logged = {key: isinstance(value, float) or f"{key}{INFINITE_IMAGES}" in scores for key, value in scores.items()}
    log.scalars(step, {f"val/{key}": value for key, value in scores.items() if is_logged[key]})
    checkpoints.commit(progress)
    logger.info(validation_line(setup, scores, perf_counter() - began))


def save_if_best(setup: TrainingSetup, scores: Mapping[str, Any]) -> Progress:
    """Save the model if its score is the best so far, or always; return the progress to commit.

    Raises:
        UserError: the score is undefined.
        NonFiniteLoss: it is not finite.
    """
    name, checkpoints = setup.settings.score, setup.checkpoints
    infinite, score = split_infinite(scores, name)
    if score is None and not infinite:
        raise UserError(f"trainer.score={name} is undefined: the validation data has no pixels or objects for it.")
    if score is not None and not math.isfinite(score):
        raise NonFiniteLoss(
            f"val/{name} is {score} at step {checkpoints.progress.step}: it cannot select checkpoints. Set a lower "
            "optim.optimizer.lr, or check the validation data."
        )
    lowest, evaluate = name in setup.data.lowest, setup.settings.evaluate
    return checkpoints.save_if_best(setup.model, scores, name, lowest=lowest, evaluate=evaluate)


def validation_line(setup: TrainingSetup, scores: Mapping[str, Any], seconds: float) -> str:
    """Return the step, the score and its best value, the loss and the duration of a validation as one line."""

    def text(infinite: int, score: float | None) -> str:
        if infinite:
            others = "" if score is None else f", {score:.4f} for the others"
            return f"infinite for {count_of(infinite, 'image')}{others}"
        assert score is not None  # `save_if_best` refuses undefined scores
        return f"{score:.4f}" if name in setup.data.lowest else f"{100 * score:.2f} %"

    name, progress = setup.settings.score, setup.checkpoints.progress
    value = None if name == "loss" else scores.get("loss")
    loss = "" if value is None else f", val/loss {value:.4f}"
    best = f"best {text(progress.best_infinite, progress.best)} at step {progress.best_step}"
    step = f"step {progress.step} of {setup.settings.steps}"
    return f"{step}: val/{name} {text(*split_infinite(scores, name))} ({best}){loss}, in {seconds:.1f} s"
