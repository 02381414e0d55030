"""Micro-batches of a training step, which are halved when memory does not suffice; the step then starts again."""

import gc
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice, tee
from typing import Any

import torch
from torch import Tensor

from dinoseg.core.contracts import Loss
from dinoseg.inference.memory import OutOfMemory, is_shortage, reason_of
from dinoseg.training.engine import Engine
from dinoseg.training.step import StepOutput
from dinoseg.utils.devices import empty_cache
from dinoseg.utils.wording import count_of

logger = logging.getLogger(__name__)


class MicroBatches:
    """Splitter of a step's batches into micro-batches: one each at first, and twice the number when memory is short.

    The update is still over the same samples. With several ranks nothing is split: ranks would wait for one another.

    Args:
        engine: device and ranks.
        criterion: loss of the training.
        min_batch_size: minimum number of samples in a micro-batch.
        accumulate: batches per optimizer step.
        undo: reverts what a step has changed when it ends before its update.

    Attributes:
        num_batches: micro-batches in the current step, over all ranks.
        divisors: (D,) divisors of the loss over the current step; None: the loss does not need them in advance.
        is_last: whether the current micro-batch is the last one of this rank's step.
    """

    num_batches: int
    divisors: Tensor | None
    is_last: bool

    def __init__(
        self, engine: Engine, criterion: Loss, min_batch_size: int, accumulate: int, *, undo: Callable[[], None]
    ) -> None:
        self._engine, self._criterion, self._accumulate = engine, criterion, accumulate
        self._smallest = min_batch_size
        self._undo = undo
        self._parts, self._samples = 1, 0  # parts of a batch; samples in the newest batch
        self._shortage: str | None = None  # reason of the newest out-of-memory error

    def of_step(self, batches: Iterator[Any], output: StepOutput) -> Iterator[Any]:
        """Yield the micro-batches of the next step; run each within `retried`, and add it to `output`.

        If memory does not suffice, the step starts again with smaller micro-batches and the same random draws.

        Raises:
            OutOfMemory: micro-batches cannot be smaller.
        """
        taken: Iterator[Any] = islice(batches, self._accumulate)
        while True:
            taken, again = tee(taken)
            yield from self._attempt(taken)
            if self._shortage is None:
                return
            self._halve(self._shortage)
            self._shortage, taken = None, again
            self._undo()
            gc.collect()
            empty_cache(self._engine.device)
            torch.manual_seed(torch.initial_seed())
            output.restart()

    @contextmanager
    def retried(self) -> Iterator[None]:
        """Suppress an out-of-memory error of a micro-batch, and let the step start again."""
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if not is_shortage(error):
                raise
            self._shortage = reason_of(error)  # the text alone: the traceback holds the step's tensors

    def _attempt(self, taken: Iterator[Any]) -> Iterator[Any]:
        count = self._accumulate * self._parts
        self.num_batches = count * self._engine.world_size
        with self.retried():
            batches, self.divisors = self._sum_divisors(self._split(taken))
        if self._shortage is not None:
            return
        for number, batch in enumerate(batches, start=1):
            self.is_last = number == count
            with self.retried():
                batch = batch.to(self._engine.device)
            if self._shortage is None:
                yield batch
            if self._shortage is not None:
                return

    def _split(self, batches: Iterable[Any]) -> Iterator[Any]:
        for batch in batches:
            self._samples = len(batch.names)
            yield from batch.split(self._parts) if self._parts > 1 else [batch]

    def _sum_divisors(self, batches: Iterable[Any]) -> tuple[Iterable[Any], Tensor | None]:
        """Return the batches, and the loss divisors (D,) of all batches and ranks if they are needed in advance.

        They are not if the loss has a single divisor, which divides the gradients after the last batch. Nor are they
        if the step consists of a single batch.
        """
        if self._criterion.num_divisors == 1 or self.num_batches == 1:
            return batches, None
        batches = list(batches)
        divisors = [self._criterion.divisors(batch).to(self._engine.device, torch.float32) for batch in batches]
        return batches, self._engine.sum(torch.stack(divisors).sum(0))

    def _halve(self, reason: str) -> None:
        parts = min(2 * self._parts, self._samples // self._smallest)
        size = -(-self._samples // self._parts)
        if parts <= self._parts or self._engine.world_size > 1:
            raise OutOfMemory(
                f"Not enough memory to train on a batch of {count_of(size, 'sample')} ({reason}). {self._remedy}"
            )
        logger.warning(
            "Out of memory with a batch of %s (%s). From now on each batch is split into %d micro-batches; each update "
            "uses the same samples. BatchNorm computes its statistics per micro-batch%s.",
            count_of(size, "sample"),
            reason,
            parts,
            ", and so does the loss its sums" if self._criterion.sums_over_batch else "",
        )
        self._parts = parts

    @property
    def _remedy(self) -> str:
        accumulate = "a smaller data.batch_size with more trainer.accumulate, " if self._engine.world_size > 1 else ""
        return (
            f"Set {accumulate}backbone.checkpointing=true, or a smaller resolution.crop; mode=plan lists settings that "
            "fit."
        )
