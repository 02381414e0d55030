"""Emergency checkpoint: saves the last completed step exactly when training ends early."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

from torch.optim import Optimizer

from dinoseg.models.model import SegmentationModel, trained_names
from dinoseg.training.checkpoint import Checkpointer
from dinoseg.training.loss_scale import LossScale
from dinoseg.training.optim import MovingAverage, tensors_of
from dinoseg.training.sharding import is_shared
from dinoseg.utils.interrupt import Interrupted

logger = logging.getLogger(__name__)


class EmergencyCheckpoint:
    """Context manager that saves `last` in the state after the newest update if an error or a signal ends its block.

    Of what a checkpoint holds, a step changes only buffers (running means) before its update, so copies of these are
    stored. An error within `updating`, such as a non-finite loss, leaves no completed step, and nothing is saved. On
    CUDA the loss may not have been read yet, so `are_finite` returns whether all updates were finite. Nothing is saved
    either if weights are sharded and one rank fails, since its shard is lost.
    """

    def __init__(
        self,
        checkpoints: Checkpointer,
        model: SegmentationModel,
        optimizer: Optimizer,
        average: MovingAverage | None,
        scale: LossScale | None,
        are_finite: Callable[[], bool],
    ) -> None:
        self._checkpoints, self._state, self._are_finite = checkpoints, (model, optimizer, average, scale), are_finite
        parameters = {name for name, _ in model.named_parameters()}
        self._buffers = [buffer for _, buffer in tensors_of(model, trained_names(model) - parameters)]
        self._start = checkpoints.progress.step
        self._copy_buffers()

    @contextmanager
    def updating(self) -> Iterator[None]:
        """Mark the block in which weights, optimizer, average and progress change together."""
        self._is_complete = False
        yield
        self._copy_buffers()

    def undo(self) -> None:
        """Revert what a step has changed before its update: gradients and buffers."""
        self._state[1].zero_grad(set_to_none=True)
        for buffer, before in zip(self._buffers, self._before, strict=True):
            buffer.copy_(before)

    def __enter__(self) -> "EmergencyCheckpoint":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        first = isinstance(error, Interrupted) and not error.again
        step = self._checkpoints.progress.step
        if not (first or isinstance(error, Exception)) or not self._is_complete or step == self._start:
            return
        if not self._are_finite():
            return
        if is_shared(self._state[0]) and not first:  # on a signal, all ranks stop at the same step
            logger.error("Training stopped after step %d, which is not saved: a rank failed to write its part.", step)
            return
        self.undo()
        try:
            self._checkpoints.save(*self._state)
        except Exception as second:  # report the first error
            logger.error("Training stopped after step %d, which could not be saved: %s", step, second)
        else:
            if self._checkpoints.writes:
                logger.warning("Training stopped after step %d, and that step is saved.", step)

    def _copy_buffers(self) -> None:
        self._before = [buffer.clone() for buffer in self._buffers]
        self._is_complete = True
