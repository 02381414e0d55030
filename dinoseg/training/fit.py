"""Training loop of a single model."""

from collections.abc import Callable
from contextlib import closing

from torch.optim import Optimizer

from dinoseg.core.contracts import Loss
from dinoseg.models.model import Segmenter
from dinoseg.report.log import RunLog
from dinoseg.training.checkpoint import Checkpoints, Progress
from dinoseg.training.engine import Engine
from dinoseg.training.feed import Feed
from dinoseg.training.meter import Meter
from dinoseg.training.optim import Pace
from dinoseg.training.time_limit import TimeLimit
from dinoseg.training.trainee import Trainee
from dinoseg.utils.interrupt import deferred
from dinoseg.utils.ranges import Count, Natural, OpenShare, Positive

NOTICE = "stopping: `last` is saved after this step (a second signal ends it at once, unsaved)"


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
    max_minutes: Positive | None = None,
) -> Progress:
    """Train `model` for `steps` optimizer steps, from where its checkpoint stands, and return its progress.

    Args:
        model: a segmenter on the engine's device.
        loss: `loss(prediction, batch) -> (scalar, dict of scalars)`.
        feed: batches, and how the model is validated.
        optimizer: over `parameter_groups`.
        engine: device, precision and ranks.
        checkpoints: progress and checkpoint files of the run.
        log: receives scalars and images.
        schedule: `schedule(step, steps)`, multiplier of the base learning rates.
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

    Raises:
        NonFiniteLoss: with the step and the samples; no step is saved then, since the last ones led to it.
        Interrupted: by a signal; the first one waits for the end of the step. This and any other error except
            `NonFiniteLoss` save the last completed step.
    """
    one = Trainee(model, loss, feed, optimizer, engine, checkpoints, log, accumulate=accumulate, ema=ema, score=score)
    run, limit = one.run, TimeLimit(max_minutes, engine)
    stream = feed.train_batches(start=run.step * accumulate)
    with (
        deferred(NOTICE) as stop,
        one.last,
        closing(Meter(run.step, steps, val_every, feed.epoch / accumulate, engine.device, engine.is_main)) as meter,
    ):
        if run.owed:
            with limit.validating():
                one.validate(stop)
            meter.pause()
            one.save()
        one.rest.tell(Pace(schedule, run.step, steps))
        batches = meter.waiting(stream, feed.remedy)
        for step in range(run.step, planned := steps):
            if one.has_stalled(patience):
                break
            steps = limit.fit_steps(step, planned, frozen_until=one.rest.begin)
            if step >= steps:
                break
            logged, owed = is_due(step + 1, log_every, steps), is_due(step + 1, val_every, steps)
            kept = owed or is_due(step + 1, save_every, steps)
            pace = Pace(schedule, step, steps)
            learnt = one.learn(batches, pace, counted=logged)
            asked = one.update(learnt, clip=clip, owed=owed, asked=stop.asked, told=logged or kept)
            meter.step(learnt.images * engine.world, one.mean, learnt.rate)
            if one.rest.ends_with(pace):
                meter.change()
            if logged:
                one.tell(learnt, meter.read())
            if asked:
                stop.leave()
            if owed:
                with limit.validating():
                    one.validate(stop)
                meter.pause()
            if kept:
                one.save()
    engine.wait()
    return run


def is_due(step: int, every: int | None, steps: int) -> bool:
    """Return whether something due every `every` steps, and after the last of `steps`, is due after this one."""
    return every is not None and (step % every == 0 or step == steps)
