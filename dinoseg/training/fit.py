"""The training loop."""

import logging
import math
from collections.abc import Callable, Iterable
from contextlib import closing, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dinoseg.contracts import Loss
from dinoseg.errors import UserError
from dinoseg.model import Segmenter, trained_names
from dinoseg.processes.interrupt import Deferral, deferred
from dinoseg.ranges import Count, Natural, OpenShare, Positive
from dinoseg.report.log import RunLog
from dinoseg.training.checkpoint import Checkpoints, Progress
from dinoseg.training.engine import Engine
from dinoseg.training.feed import Feed
from dinoseg.training.last_step import LastStep
from dinoseg.training.meter import Meter
from dinoseg.training.micro_batches import MicroBatches
from dinoseg.training.optim import MovingAverage, set_learning_rates, tensors_of
from dinoseg.training.tally import Tally

logger = logging.getLogger(__name__)
_NOTICE = "stopping: `last` is saved after this step (a second signal ends it at once, unsaved)"


class NonFiniteLoss(UserError):
    """The loss became infinite or not a number."""


def fit(
    model: Segmenter,
    loss: Loss,
    feed: Feed,
    optimizer: Optimizer,
    engine: Engine,
    checkpoints: Checkpoints,
    log: RunLog,
    *,
    schedule: Callable[[int, int], float],
    steps: Count,
    val_every: Count,
    save_every: Count | None = None,
    log_every: Count = 10,
    accumulate: Count = 1,
    clip: Positive | None = 1.0,
    patience: Natural | None = None,
    ema: OpenShare | None = None,
    score: str = "miou",
) -> Progress:
    """Train `model` for `steps` optimizer steps, from where its checkpoint stands, and return its progress.

    Args:
        model: a segmenter on the engine's device.
        loss: `loss(prediction, batch) -> (scalar, dict of scalars)`.
        feed: batches, and how the model is validated.
        optimizer: its groups carry `base_lr` and `names`.
        engine: device, precision and ranks.
        checkpoints: where the run stands, and where it is kept.
        log: scalars and pictures.
        schedule: `schedule(step, steps)`, what the base rates are multiplied by.
        steps: optimizer steps in all.
        val_every: steps between validations; the last step validates too.
        save_every: steps between saves beside those at each validation.
        log_every: steps between log rows.
        accumulate: batches per optimizer step.
        clip: highest norm of the gradient, or None.
        patience: stop after more validations than this without a better score, or None.
        ema: decay of a moving average of the weights, which then is what gets scored and kept as best.
        score: the score of a validation that decides which checkpoint is best.

    Raises:
        NonFiniteLoss: naming the step and the samples; then no step is saved, for the last ones led to it.
        Interrupted: by a signal; a first one waits for the end of the step. Whatever else ends it saves that, too.
    """
    _check_score(score, feed)
    net = engine.prepare(model)
    average = MovingAverage(tensors_of(model, trained_names(model)), ema) if ema else None
    run = checkpoints.restore(model, optimizer, average)
    stream = feed.train_batches(start=run.step * accumulate)
    model.train()
    with (
        deferred(_NOTICE) as stop,
        LastStep(checkpoints, model, optimizer, average) as last,
        closing(Meter(run.step, steps, val_every, feed.epoch / accumulate, engine.device, engine.is_main)) as meter,
    ):
        validate = partial(_validate, model, loss, feed, engine, checkpoints, log, average, score, stop, meter)
        if run.owed:
            validate()
            checkpoints.save(model, optimizer, average)
        batches, micro = meter.waiting(stream), MicroBatches(engine, accumulate, model.head.least_batch, last.undo)
        for step in range(run.step, steps):
            if patience is not None and run.stale > patience:
                logger.info("No better score in %d validations: stopped at step %d.", run.stale, step)
                break
            engine.seed(feed.seed, step)
            rate = set_learning_rates(optimizer, schedule(step, steps))
            model.set_progress(step / steps)
            count = feed.tally if _due(step + 1, log_every, steps) else _uncounted
            sums, names, images, parts, tally = micro.through(partial(_gradients, net, loss, engine, count), batches)
            # ranks learn of a stop at the same step, and lose none when one of them is lost here: no update has begun
            total, weight, asked = engine.total(*sums, torch.tensor(float(stop.asked)))
            with last.update():
                mean, norm = _step(engine, optimizer, total, weight, clip, step, names)
                if average is not None:
                    average.update(step)
                run.step, run.owed = step + 1, _due(step + 1, val_every, steps)
            meter.step(images * engine.world, mean, rate)
            if _due(run.step, log_every, steps):
                row = {"train/loss": mean, "train/lr": rate, "train/gradient_norm": norm, **meter.read()}
                log.scalars(run.step, row | _terms(parts, tally))
            if asked:
                stop.leave()
            if run.owed:
                validate()
            if _due(run.step, val_every, steps) or _due(run.step, save_every, steps):
                checkpoints.save(model, optimizer, average)
    engine.wait()
    return run


def _gradients(
    net: nn.Module,
    loss: Loss,
    engine: Engine,
    tallied: Callable[[Engine], Tally | None],
    batches: Iterable[Any],
    count: int,
) -> tuple[list[Tensor], list[str], int, dict[str, Tensor], Tally | None]:
    """Go backward through each of `count` batches, and count what was predicted.

    Returns:
        The sums of loss times weight and of weights, the samples' names, how many images, the last batch's parts, and
        what was counted.
    """
    tally = tallied(engine)
    sums = [torch.zeros((), device=engine.device)] * 2
    names, images = [], 0
    for number, drawn in enumerate(batches, start=1):
        batch = drawn.to(engine.device)
        with engine.accumulating(net, last=number == count):
            prediction = net(batch.image)
            value, parts = loss(prediction, batch)
            weight = parts.get("weight", torch.full_like(value, len(batch.names)))
            engine.backward(value * weight)
        if tally is not None:
            tally.add(prediction, batch)
        sums = [sums[0] + value.detach() * weight, sums[1] + weight]
        names += batch.names
        images += batch.image.shape[:-3].numel()
    return sums, names, images, parts, tally


def _uncounted(engine: Engine) -> None:
    """Count nothing, in a step that no row of the log tells of."""


def _terms(parts: dict[str, Tensor], tally: Tally | None) -> dict[str, float | None]:
    """Return the scores of a step's batches, and the terms of the loss of this rank's last one."""
    terms: dict[str, float | None] = {
        f"train/{name}": value.item() for name, value in parts.items() if name != "weight"
    }
    return terms if tally is None else tally.read() | terms


def _step(
    engine: Engine, optimizer: Optimizer, total: float, weight: float, clip: float | None, step: int, names: list[str]
) -> tuple[float, float]:
    """Update with the mean over all labels of the step, however they lay in batches and ranks.

    Returns:
        The loss and the norm of the gradient.
    """
    mean = total / weight if weight else 0.0
    norm = math.nan
    if math.isfinite(mean):
        norm = engine.step(optimizer, scale=engine.world / weight if weight else 0.0, clip=clip)
    if not math.isfinite(norm):
        everywhere = engine.gather(names)
        raise NonFiniteLoss(
            f"Step {step}: the loss is {mean:g} and the gradient norm {norm:g}, so training stops before the update. "
            f"The samples were {', '.join(everywhere)}. What was saved before is untouched: give a lower "
            f"optim.optimizer.lr, set trainer.clip, or look at these samples."
        )
    return mean, norm


def _validate(
    model: Segmenter,
    loss: Loss,
    feed: Feed,
    engine: Engine,
    checkpoints: Checkpoints,
    log: RunLog,
    average: MovingAverage | None,
    score: str,
    stop: Deferral,
    meter: Meter,
) -> None:
    """Score the model (its moving average where there is one), log it, and keep it where it is the best yet."""
    engine.seed(feed.seed, checkpoints.progress.step)
    with average.swapped() if average is not None else nullcontext():
        engine.align(model)  # each rank averages running means of its own
        with stop.at_once(allowed=engine.world == 1):  # a run that goes on begins with the validation it owes
            scores, pictures = feed.validate(model, loss, engine)
        if scores[score] is None:
            raise UserError(f"trainer.score={score} is undefined: the validation data has nothing to count for it.")
        if not math.isfinite(scores[score]):
            raise NonFiniteLoss(
                f"val/{score} is {scores[score]} at step {checkpoints.progress.step}: no checkpoint can be chosen by "
                "it. Give a lower optim.optimizer.lr, or look at the validation data."
            )
        judged = checkpoints.judge(model, scores[score], lowest=score in feed.lowest)
    row = {f"val/{name}": value for name, value in scores.items() if isinstance(value, float)}
    log.pictures(checkpoints.progress.step, pictures)
    log.scalars(checkpoints.progress.step, row)  # last: where something fails before it, the validation comes again
    checkpoints.settle(judged)
    meter.pause()
    logger.info(
        "step %d: val/%s %.4f (best %.4f at step %d)",
        checkpoints.progress.step,
        score,
        scores[score],
        checkpoints.progress.best,
        checkpoints.progress.best_step,
    )


def _check_score(name: str, feed: Feed) -> None:
    if name not in feed.score_names:
        raise UserError(f"trainer.score={name} is not a score. Choose one of {', '.join(feed.score_names)}.")


def _due(step: int, every: int | None, steps: int) -> bool:
    return every is not None and (step % every == 0 or step == steps)
