"""A head in training: the only one of a model, or one of several that share a frozen backbone."""

import logging
from contextlib import AbstractContextManager, nullcontext

from dinoseg.core.contracts import Head, Loss
from dinoseg.models.model import SegmentationModel
from dinoseg.report.log import RunLog
from dinoseg.training.checkpoint import Checkpointer, Progress
from dinoseg.training.validation import Draws
from dinoseg.utils.atomic import write_json
from dinoseg.utils.errors import UserError

logger = logging.getLogger(__name__)
DROPPED = "dropped.json"  # reason, in the folder of a head that has dropped out


class NonFiniteLoss(UserError):
    """Error raised when the loss, the gradient norm or the validation score is not finite."""


class HeadTraining:
    """The head of a model in training, with its loss, log and best checkpoint.

    One of several heads draws random numbers, and ends, as if it were trained alone.

    Args:
        model: a segmenter with this head.
        criterion: `criterion(prediction, batch) -> (scalar, dict of scalars)`.
        checkpoints: progress and best checkpoint.
        log: receives scalars and images.
        name: name among several heads; empty for the only one.

    Attributes:
        is_active: whether steps and validations still include it.
        dropped: why its training was abandoned; None if it was not.
    """

    is_active = True
    dropped: str | None = None

    def __init__(
        self, model: SegmentationModel, criterion: Loss, checkpoints: Checkpointer, log: RunLog, *, name: str = ""
    ) -> None:
        self.model, self.criterion, self.checkpoints, self.log = model, criterion, checkpoints, log
        self.name, self.prefix = name, name and f"{name}: "
        self._draws: Draws | None = None

    @property
    def progress(self) -> Progress:
        """Return the progress of its training."""
        return self.checkpoints.progress

    @property
    def reads_maps(self) -> bool:
        """Return whether it takes feature maps, and does not run the backbone in a way of its own."""
        kind = type(self.model.head)
        return kind.run is Head.run and kind.forward_frozen is Head.forward_frozen

    def has_ended(self, patience: int | None) -> bool:
        """Return whether its training has ended, also by `patience` validations without a better score."""
        if self.is_active and patience is not None and self.progress.stale >= patience:
            self.is_active = False
            where = self.prefix, self.progress.stale, self.progress.step
            logger.info("%sNo better score in %d validations: early stopping at step %d.", *where)
        return not self.is_active

    def drop(self, error: NonFiniteLoss) -> None:
        """End its training, and write the reason to `dropped.json` in its run folder.

        Raises:
            NonFiniteLoss: it is the only head.
        """
        if not self.name:
            raise error
        self.is_active, self.dropped = False, str(error)
        logger.warning("%s is dropped; the other heads continue. %s", self.name, error)
        if self.checkpoints.writes:
            reason = {"step": self.progress.step, "reason": self.dropped}
            write_json(self.checkpoints.folder.parent / DROPPED, reason)

    def start_draws(self) -> None:
        """Let its random draws of a step start from the current state of the generators."""
        self._draws = Draws(next(self.model.parameters()).device) if self.name else None

    def drawing(self) -> AbstractContextManager:
        """Return a context in which it draws random numbers as if it were trained alone."""
        return nullcontext() if self._draws is None else self._draws.going_on()
