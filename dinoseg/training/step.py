"""One training step: the loss of a micro-batch, sums over micro-batches, and metrics that are read later on CUDA."""

import logging
import math
from collections import deque
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dinoseg.core.shapes import Prediction
from dinoseg.training.engine import Engine
from dinoseg.training.head_training import HeadTraining, NonFiniteLoss
from dinoseg.training.loss_scale import widened
from dinoseg.training.tally import Tally

logger = logging.getLogger(__name__)


Predictions = Sequence[Prediction | None]  # one per head; None: the head's training has ended


class BatchLoss(NamedTuple):
    """Losses of N heads for a micro-batch; the loss of a step is the sum of totals divided by the sum of weights.

    Attributes:
        total: tensors to backpropagate, (N,).
        weight: divisors of the totals, (N,).
        parts: named parts of each head's loss.
    """

    total: Tensor
    weight: Tensor
    parts: list[dict[str, Tensor]]


def predict(net: nn.Module, images: Any, *, in_float32: bool) -> Predictions:
    """Run the forward pass for images, or for features of images; return the prediction of each head."""
    predictions = net(images)
    predictions = widened(predictions) if in_float32 else predictions
    return predictions if isinstance(predictions, list) else [predictions]


def batch_loss(
    heads: Sequence[HeadTraining], predictions: Predictions, batch: Any, divisors: Tensor | None, num_batches: int
) -> BatchLoss:
    """Return the losses of a micro-batch.

    Args:
        heads: in training.
        predictions: of each head for the batch.
        batch: with its labels.
        divisors: (D,) divisors of the loss over the whole step, if it has several and there are several micro-batches.
        num_batches: number of micro-batches in the step, over all ranks.
    """
    rows = []
    for head, prediction in zip(heads, predictions, strict=True):
        with head.drawing():
            rows.append(_loss_of(head, prediction, batch, divisors, num_batches))
    totals, weights, parts = zip(*rows, strict=True)
    return BatchLoss(torch.stack(totals), torch.stack(weights), list(parts))


def _loss_of(
    head: HeadTraining, prediction: Prediction | None, batch: Any, divisors: Tensor | None, num_batches: int
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    criterion = head.criterion
    if prediction is None:
        zero = sum((p.sum() * 0.0 for p in head.model.head.parameters() if p.requires_grad), batch.mask.new_zeros(()))
        return zero.float(), zero.detach().float(), {}  # ranks expect gradients of all trained parameters
    if divisors is not None:
        total, _, parts = criterion.step_loss(prediction, batch, divisors)
        return total, torch.full_like(total, 1 / num_batches), parts
    value, parts = criterion(prediction, batch)
    weight = parts.get("weight", torch.full_like(value, len(batch.names)))
    if criterion.num_divisors > 1:  # the only micro-batch of the step
        weight = torch.ones_like(value)
    return value * weight, weight, parts


class StepOutput:
    """Sums over the micro-batches of a step on this rank, for N heads.

    Args:
        heads: in training.
        device: of the model.
        make_tally: returns an empty tally of predictions; None: none are counted.

    Attributes:
        sums: sums (2, N) of the losses' totals and of their weights.
        names: of the samples.
        images: number of images.
        parts: named parts of each head's loss for the last micro-batch.
        tallies: counts of each head's predictions.
    """

    sums: Tensor
    names: list[str]
    images: int
    parts: list[dict[str, Tensor]]
    tallies: list[Tally | None]

    def __init__(
        self, heads: Sequence[HeadTraining], device: torch.device, make_tally: Callable[[], Tally | None] | None
    ) -> None:
        self._heads, self._device, self._make_tally = heads, device, make_tally or (lambda: None)
        self.restart()

    def restart(self) -> None:
        """Start the step, or start it again: nothing is summed up, and each head draws from the generators' state."""
        self.sums = torch.zeros(2, len(self._heads), device=self._device)
        self.names, self.images = [], 0
        self.tallies = [self._make_tally() for _ in self._heads]
        for head in self._heads:
            head.start_draws()

    def add(self, loss: BatchLoss, predictions: Predictions, batch: Any) -> None:
        """Add a micro-batch after its backward pass."""
        for tally, prediction in zip(self.tallies, predictions, strict=True):
            if tally is not None and prediction is not None:
                tally.add(prediction, batch)
        self.sums = self.sums + torch.stack([loss.total.detach(), loss.weight])
        self.names += batch.names
        self.images += batch.count
        self.parts = loss.parts

    def over_ranks(self, engine: Engine, stop_request: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the totals (N,), the weights (N,) and the stop requests () over all ranks; 0: no stop request."""
        sums = engine.total(*self.sums.flatten(), stop_request)
        return sums[: len(self._heads)], sums[len(self._heads) : -1], sums[-1]


class StepMetrics:
    """Losses and gradient norms of N heads, and stop requests, of a step over all ranks.

    On CUDA they are copied to pinned memory while the next step is prepared, so that reading them takes no time.

    Args:
        step: 0-based number of the step.
        names: of this rank's samples.
        losses: mean losses, (N,).
        norms: gradient norms before clipping, (N,).
        stops: above 0 if a rank has a stop request, ().
    """

    def __init__(self, step: int, names: list[str], losses: Tensor, norms: Tensor, stops: Tensor) -> None:
        self.step, self.names, self.norms = step, names, norms
        self._copied: torch.cuda.Event | None = None
        values = self._host = torch.cat([losses, norms, stops.to(norms.device).to(norms.dtype)[None]])
        if values.device.type == "cuda":
            self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._host.copy_(values, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> tuple[list[float], list[float], float]:
        """Return the losses, the norms and the stop requests once the device has completed the step."""
        if self._copied is not None:
            self._copied.synchronize()
        *values, stops = self._host.tolist()
        return values[: len(values) // 2], values[len(values) // 2 :], stops


class MetricsQueue:
    """Metrics of the newest steps; on CUDA, those of a step are read one step later, so that the host does not wait.

    Args:
        engine: device and ranks.
        optimizer: of the training.
        heads: in training; one whose loss is not finite is dropped.

    Attributes:
        losses: of each head in the last step that was read; NaN before.
        norms: gradient norms of that step.
    """

    def __init__(self, engine: Engine, optimizer: Optimizer, heads: Sequence[HeadTraining]) -> None:
        self._engine, self._optimizer, self._heads = engine, optimizer, heads
        self._unread: deque[StepMetrics] = deque()  # oldest first
        self.losses = self.norms = [math.nan] * len(heads)

    @property
    def newest_norms(self) -> Tensor | None:
        """Return the gradient norms (N,) of the newest step if they have not been read yet."""
        return self._unread[-1].norms if self._unread else None

    @property
    def mean_loss(self) -> float:
        """Return the mean loss over the heads whose training goes on."""
        active = [loss for head, loss in zip(self._heads, self.losses, strict=True) if head.is_active]
        return fmean(active or self.losses)

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
        read = read or (stop_requested and self._engine.world_size == 1)
        later = 0 if read or not self._engine.updates_asynchronously(self._optimizer) else 1
        is_stopping = False
        while len(self._unread) > later:
            oldest = self._unread[0]  # not removed if not finite, so that nothing is saved
            losses, norms, stops = oldest.read()
            for head, loss, norm in zip(self._heads, losses, norms, strict=True):
                if head.is_active and not math.isfinite(norm):
                    head.drop(self._error(oldest, loss, norm))
            self._unread.popleft()
            self.losses, self.norms, is_stopping = losses, norms, is_stopping or stops > 0
        return is_stopping

    def are_finite(self) -> bool:
        """Return whether each unread step is finite, without communication, if a training ends early."""
        for metrics in self._unread:
            norms = zip(self._heads, metrics.read()[1], strict=True)
            if not all(math.isfinite(norm) for head, norm in norms if head.is_active):
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
