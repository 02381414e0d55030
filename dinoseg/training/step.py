"""One training step: loss of a micro-batch, sums over micro-batches, scores of its predictions, and its metrics."""

import logging
import math
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from dinoseg.core.contracts import Loss
from dinoseg.core.shapes import Batch, Prediction, SegmentationData
from dinoseg.core.task import SEMANTIC, Task
from dinoseg.metrics.confusion import make_counts
from dinoseg.training.engine import Engine
from dinoseg.utils.errors import UserError

logger = logging.getLogger(__name__)
_POINTS = 128 * 128  # maximum per image, evenly spread: enough for shares, at a few percent of a step's time


class NonFiniteLoss(UserError):
    """Error raised when the loss, the gradient norm or the validation score is not finite."""


class BatchLoss(NamedTuple):
    """Loss of a micro-batch; the loss of a step is the sum of totals divided by the sum of weights.

    Attributes:
        total: what to backpropagate, ().
        weight: divisor of the total, ().
        parts: named parts of the loss.
    """

    total: Tensor
    weight: Tensor
    parts: dict[str, Tensor]


def batch_loss(criterion: Loss, prediction: Any, batch: Any, divisors: Tensor | None, num_batches: int) -> BatchLoss:
    """Return the loss of a micro-batch.

    Args:
        criterion: `criterion(prediction, batch) -> (scalar, dict of scalars)`.
        prediction: for the batch.
        batch: with its labels.
        divisors: (D,) divisors of the loss over the whole step, if it has several and there are several micro-batches.
        num_batches: number of micro-batches in the step, over all ranks.
    """
    if divisors is not None:
        # every term is already its share of the step: the weights of all micro-batches add up to 1
        total, _, parts = criterion.step_loss(prediction, batch, divisors)
        return BatchLoss(total, torch.full_like(total, 1 / num_batches), parts)
    value, parts = criterion(prediction, batch)
    weight = parts.get("weight", torch.full_like(value, len(batch.names)))
    # its terms are divided by divisors of their own already, since this is the only micro-batch of the step
    if criterion.num_divisors > 1:
        weight = torch.ones_like(value)
    return BatchLoss(value * weight, weight, parts)


class StepScores:
    """Class counts of one step over its batches and all ranks; they depend on the step only, also after a resume.

    Only `read` waits for an accelerator.
    """

    def __init__(self, data: SegmentationData, engine: Engine, task: Task = SEMANTIC) -> None:
        self._engine = engine
        self._counts = make_counts(task, len(data.classes), data.ignore_index)
        self._counts.counts = torch.zeros_like(self._counts.counts, device=engine.device)

    @torch.no_grad()
    def add(self, prediction: Prediction, batch: Batch) -> None:
        """Count the predictions for a batch that were made for its loss."""
        mask = _subsample(batch.mask)
        self._counts.update(prediction.class_ids((mask.shape[-2], mask.shape[-1])), mask)

    def read(self) -> dict[str, float | None]:
        """Return `train/accuracy` and `train/miou` of the augmented crops; None if no pixel counts."""
        self._counts.counts = self._engine.sum(self._counts.counts)
        scores = self._counts.compute()
        return {f"train/{name}": scores[name] for name in ("accuracy", "miou")}


def _subsample(mask: Tensor) -> Tensor:
    """Return every n-th ID of masks (..., H, W) in both directions: those nearest to the centres of a coarser grid."""
    height, width = mask.shape[-2:]
    apart = max(1.0, math.sqrt(height * width / _POINTS))
    # the prediction is made at the centres of the coarser grid, too: the first pixel of each cell lies half a cell away
    rows, columns = (_centres(length, math.ceil(length / apart), mask.device) for length in (height, width))
    return mask[..., rows[:, None], columns]


def _centres(length: int, cells: int, device: torch.device) -> Tensor:
    return ((torch.arange(cells, device=device) + 0.5) * length / cells).long()


class StepOutput:
    """Sums over the micro-batches of a step on this rank.

    Args:
        device: of the model.
        make_scores: returns empty scores of predictions; None: none are counted.

    Attributes:
        total: sum of the losses' totals, ().
        weight: sum of their weights, ().
        names: of the samples.
        images: number of images.
        parts: named parts of the loss of the last micro-batch.
        scores: counts of the predictions.
    """

    total: Tensor
    weight: Tensor
    names: list[str]
    images: int
    parts: dict[str, Tensor]
    scores: StepScores | None

    def __init__(self, device: torch.device, make_scores: Callable[[], StepScores | None] | None) -> None:
        self._device, self._make_scores = device, make_scores
        self.restart()

    def restart(self) -> None:
        """Start the step, or start it again: nothing is summed up."""
        self.total = torch.zeros((), device=self._device)
        self.weight = torch.zeros((), device=self._device)
        self.names = []
        self.images = 0
        self.scores = None if self._make_scores is None else self._make_scores()

    def add(self, loss: BatchLoss, prediction: Any, batch: Any) -> None:
        """Add a micro-batch after its backward pass."""
        if self.scores is not None:
            self.scores.add(prediction, batch)
        # tensors on the device: a number of Python would wait for it in each micro-batch
        self.total = self.total + loss.total.detach()
        self.weight = self.weight + loss.weight
        self.names += batch.names
        self.images += batch.count
        self.parts = loss.parts


class StepMetrics:
    """Loss, gradient norm and stop requests of a step over all ranks, each ().

    On CUDA they are copied to pinned memory while the next step is prepared, so that reading them takes no time.

    Args:
        step: number of the step, from 1, as in the log rows.
        names: of this rank's samples.
        loss: mean loss.
        norm: gradient norm before clipping.
        stops: above 0 if a rank has a stop request.
    """

    def __init__(self, step: int, names: list[str], loss: Tensor, norm: Tensor, stops: Tensor) -> None:
        self.step, self.names, self.norm = step, names, norm
        self._copied: torch.cuda.Event | None = None
        # one copy of three values instead of three
        values = self._host = torch.stack([loss, norm, stops.to(norm.device).to(norm.dtype)])
        if values.device.type == "cuda":
            # only a copy to pinned memory is asynchronous
            self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._host.copy_(values, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> tuple[float, float, float]:
        """Return the loss, the norm and the stop requests once the device has completed the step."""
        if self._copied is not None:
            self._copied.synchronize()
        loss, norm, stops = self._host.tolist()
        return loss, norm, stops


class MetricsQueue:
    """Metrics of the newest steps; on CUDA, those of a step are read one step later, so that the host does not wait.

    Args:
        engine: device and ranks.
        optimizer: of the training.

    Attributes:
        loss: of the last step that was read; NaN before.
        norm: gradient norm of that step.
    """

    def __init__(self, engine: Engine, optimizer: Optimizer) -> None:
        self._engine = engine
        self._late = 1 if engine.updates_asynchronously(optimizer) else 0  # steps that may stay unread
        self._unread: deque[StepMetrics] = deque()  # oldest first
        self.loss = self.norm = math.nan

    @property
    def newest_norm(self) -> Tensor | None:
        """Return the gradient norm () of the newest step if it has not been read yet."""
        return self._unread[-1].norm if self._unread else None

    def add(self, metrics: StepMetrics, *, read: bool, stop_requested: bool) -> bool:
        """Add the metrics of a step, and read those that are due; return whether a rank has a stop request.

        Args:
            metrics: of the step.
            read: whether to read all; required if anything is saved or logged after the step.
            stop_requested: whether this rank has a stop request. Alone it reads all; other ranks do not know of it yet.

        Raises:
            NonFiniteLoss: of this step or the one before.
        """
        self._unread.append(metrics)
        # a single rank stops after this step; several stop together, once they have read the sum of their requests
        read = read or (stop_requested and self._engine.world_size == 1)
        late = 0 if read else self._late
        is_stopping = False
        while len(self._unread) > late:
            oldest = self._unread[0]  # not removed if not finite, so that nothing is saved
            loss, norm, stops = oldest.read()
            # the norm is NaN where the loss is not finite, and infinite or NaN where a gradient is
            if not math.isfinite(norm):
                raise self._error(oldest, loss, norm)
            self._unread.popleft()
            self.loss, self.norm = loss, norm
            is_stopping = is_stopping or stops > 0
        return is_stopping

    def are_finite(self) -> bool:
        """Return whether each unread step is finite, without communication, if a training ends early."""
        for metrics in self._unread:
            if not math.isfinite(metrics.read()[1]):
                logger.error("The loss of step %d was not finite: nothing is saved.", metrics.step)
                return False
        return True

    def _error(self, metrics: StepMetrics, loss: float, norm: float) -> NonFiniteLoss:
        everywhere = self._engine.gather(metrics.names)
        is_half = self._engine.dtype == torch.float16
        other = ", choose engine.precision=fp32 (float16 overflows at 65504)" if is_half else ""
        return NonFiniteLoss(
            f"Step {metrics.step}: the loss is {loss:g} and the gradient norm {norm:g}, so training stops before the "
            f"update. The samples were {', '.join(everywhere)}. Earlier checkpoints are unchanged: set a lower "
            f"optim.optimizer.lr, set trainer.clip{other}, or check these samples."
        )
