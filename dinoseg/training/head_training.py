"""A head in training: the only one of a model, or one of several that share a frozen backbone."""

import logging
from contextlib import AbstractContextManager, nullcontext

from dinoseg.core.contracts import Loss
from dinoseg.models.model import Segmenter
from dinoseg.report.log import RunLog
from dinoseg.training.checkpoint import Checkpoints, Progress
from dinoseg.utils.errors import UserError

logger = logging.getLogger(__name__)


class NonFiniteLoss(UserError):
    """Error raised when the loss, the gradient norm or the validation score is not finite."""


class HeadTraining:
    """The head of a model in training, with its loss, log and best checkpoint.

    Args:
        model: a segmenter with this head.
        criterion: `criterion(prediction, batch) -> (scalar, dict of scalars)`.
        checkpoints: progress and best checkpoint.
        log: receives scalars and images.
        name: name among several heads; empty for the only one.

    Attributes:
        is_active: whether steps and validations still include it.
    """

    is_active = True

    def __init__(
        self, model: Segmenter, criterion: Loss, checkpoints: Checkpoints, log: RunLog, *, name: str = ""
    ) -> None:
        self.model, self.criterion, self.checkpoints, self.log = model, criterion, checkpoints, log
        self.name, self.prefix = name, name and f"{name}: "

    @property
    def progress(self) -> Progress:
        """Return the progress of its training."""
        return self.checkpoints.progress

    def has_ended(self, patience: int | None) -> bool:
        """Return whether its training has ended, also by more than `patience` validations without a better score."""
        if self.is_active and patience is not None and self.progress.stale > patience:
            self.is_active = False
            where = self.prefix, self.progress.stale, self.progress.step
            logger.info("%sNo better score in %d validations: stopped at step %d.", *where)
        return not self.is_active

    def drop(self, error: NonFiniteLoss) -> None:
        """End its training for a loss or score that is not finite: the whole training, since it is the only head."""
        raise error

    def start_draws(self) -> None:
        """Let its random draws of a step start from the current state of the generators."""

    def drawing(self) -> AbstractContextManager:
        """Return a context in which it draws random numbers as if it were trained alone."""
        return nullcontext()
