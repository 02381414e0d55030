"""Training state of one of several heads: its steps, validations and checkpoints."""

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from dinoseg.training.checkpoint import Progress
from dinoseg.training.emergency import EmergencyCheckpoint
from dinoseg.training.feed import Validation
from dinoseg.training.loss_scale import widened
from dinoseg.training.micro_batches import MicroBatches
from dinoseg.training.optim import ScheduleState, build_ema, set_learning_rates
from dinoseg.training.step import MetricsQueue, StepMetrics, StepOutput, batch_loss
from dinoseg.training.trainer import Experiment, check_score, finite_score, log_step, on_device, scored_weights

logger = logging.getLogger(__name__)


class HeadTraining:
    """A head in training, with its optimizer, moving average and progress.

    Args:
        experiment: of this head.
        name: prefix of its log messages.
    """

    def __init__(self, experiment: Experiment, name: str) -> None:
        engine, settings, model = experiment.engine, experiment.settings, experiment.model
        check_score(experiment.data, settings.score)
        self.experiment, self._name, self.engine = experiment, name, engine
        self.net, self.ema, self.scale = engine.prepare(model), build_ema(model, settings.ema), engine.loss_scale()
        self._state = (model, experiment.optimizer, self.ema, self.scale)
        self.run = experiment.checkpoints.restore(*self._state)
        self.metrics = MetricsQueue(engine, experiment.optimizer)
        self.last = EmergencyCheckpoint(experiment.checkpoints, *self._state, self.metrics.are_finite)
        self._micro = MicroBatches(
            engine,
            experiment.criterion,
            settings.accumulate,
            smallest=model.head.least_batch,
            prepare=partial(on_device, experiment, self.ema),
            undo=self.last.undo,
            has_several_heads=True,
        )
        model.train()

    def has_stalled(self, patience: int | None) -> bool:
        """Return whether more than `patience` validations have passed without a better score; if so, log it."""
        stalled = patience is not None and self.run.stale > patience
        if stalled:
            named = self._name, self.run.stale, self.run.step
            logger.info("%s: No better score in %d validations: stopped at step %d.", *named)
        return stalled

    def learn(self, batches: Iterator[Any], position: ScheduleState, *, counted: bool) -> tuple[StepOutput, float]:
        """Run the forward and backward passes of the next step; return their sums and the learning rate."""
        experiment = self.experiment
        self.engine.seed(experiment.data.seed, self.run.step)
        rate = set_learning_rates(experiment.optimizer, position)
        experiment.model.set_progress(position.share)
        output = StepOutput(self.engine.device, partial(experiment.data.tally, self.engine) if counted else None)
        for batch in self._micro.of_step(batches, output):
            with self._micro.retried(), self.engine.sync(self.net, self._micro.is_last):
                prediction = self.net(batch.image) if self.scale is None else widened(self.net(batch.image))
                micro = self._micro
                loss = batch_loss(experiment.criterion, prediction, batch, micro.divisors, micro.num_batches)
                self.engine.backward(loss.total, self.scale, loss.weight)
                output.add(loss, prediction, batch)
            prediction = loss = None  # type: ignore[assignment]
        return output, rate

    def update(self, output: StepOutput, *, clip: float | None, owed: bool, asked: int, told: bool) -> bool:
        """Update the weights; return whether any rank has a stop request."""
        total, weight, stops = self.engine.total(*output.sums, asked)
        before, optimizer = self.metrics.newest_norm, self.experiment.optimizer
        with self.last.updating():
            mean, norm = self.engine.optimizer_step(
                optimizer, total, weight, clip=clip, before=before, loss_scale=self.scale
            )
            metrics = StepMetrics(self.run.step, output.names, mean, norm, stops)
            is_stopping = self.metrics.add(metrics, read=told, stop_requested=asked > 0)
            if self.ema is not None:
                self.ema.update(self.run.step)
            self.run.step, self.run.validation_pending = self.run.step + 1, owed
        return is_stopping

    def tell(self, output: StepOutput, rate: float, speed: dict[str, float]) -> None:
        """Log the newest step."""
        log_step(self.experiment.log, self.run.step, output, self.metrics, rate, self.scale, speed)

    def as_scored(self) -> AbstractContextManager:
        """Swap in the tensors that are scored."""
        return scored_weights(self.experiment.model, self.ema, self.engine)

    def judge(self, validation: Validation) -> Progress:
        """Save the model as `best` if its score is the best so far, and return the updated progress."""
        name, data = self.experiment.settings.score, self.experiment.data
        score = finite_score(validation.scores[name], name, self.run.step)
        return self.experiment.checkpoints.save_if_best(self.experiment.model, score, lowest=name in data.lowest)

    def settle(self, validation: Validation, judged: Progress) -> None:
        """Log a validation, and commit the progress that `judge` returned for it."""
        step, scores, log, name = self.run.step, validation.scores, self.experiment.log, self.experiment.settings.score
        log.pictures(step, validation.pictures)
        log.scalars(step, {f"val/{key}": value for key, value in scores.items() if isinstance(value, float)})
        self.experiment.checkpoints.commit(judged)
        best = self.run.best, self.run.best_step
        logger.info("%s: step %d: val/%s %.4f (best %.4f at step %d)", self._name, step, name, scores[name], *best)

    def save(self) -> None:
        """Save the `last` checkpoint."""
        self.experiment.checkpoints.save(*self._state)
