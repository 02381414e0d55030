"""Micro-batches of a training step, which are halved when memory does not suffice; the step then starts again."""

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from dinoseg.core.contracts import Loss
from dinoseg.inference.memory import OutOfMemory, is_shortage, reason_of
from dinoseg.training.engine import Engine
from dinoseg.training.step import StepOutput
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
        divisors: (D,) divisors of the loss over the current step; None: they are not needed in advance, since the loss
            has a single one, which divides the gradients after the last batch, or the step is a single batch.
        is_last: whether the current micro-batch is the last one of this rank's step.
    """

    num_batches: int
    divisors: Tensor | None = None
    is_last: bool

    def __init__(
        self, engine: Engine, criterion: Loss, min_batch_size: int, accumulate: int, *, undo: Callable[[], None]
    ) -> None:
        self._engine, self._criterion, self._accumulate = engine, criterion, accumulate
        self._smallest = min_batch_size
        self._undo = undo
        self._parts = 1  # of a batch
        self._shortage: str | None = None  # reason of the newest out-of-memory error

    def split_step(self, stream: Iterator[Any], output: StepOutput) -> Iterator[Any]:
        """Yield the micro-batches of the next step; run each within `retry_batch`, and add it to `output`.

        If memory does not suffice, the step starts again with smaller micro-batches and the same random draws.

        Raises:
            OutOfMemory: micro-batches cannot be smaller.
        """
        batches = list(islice(stream, self._accumulate))
        while True:
            parts = batches
            if self._parts > 1:
                parts = [part for batch in batches for part in batch.split(self._parts)]
            self.num_batches = len(parts) * self._engine.world_size
            if self._criterion.num_divisors > 1 and self.num_batches > 1:
                # sums of labels need memory, too, for their masks on the device
                with self.retry_batch():
                    self.divisors = self._sum_divisors(parts)
            for number, part in enumerate(parts, start=1):
                # a part has failed: those after it would add to an incomplete gradient
                if self._shortage is not None:
                    break
                self.is_last = number == len(parts)
                yield part
            if self._shortage is None:
                return
            self._halve(self._shortage, len(batches[-1].names))
            self._start_again(output)

    @contextmanager
    def retry_batch(self) -> Iterator[None]:
        """Suppress an out-of-memory error of a micro-batch, and let the step start again."""
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if not is_shortage(error):
                raise
            # the text alone: the traceback would hold the tensors of the step, and with them its memory
            self._shortage = reason_of(error)

    def _sum_divisors(self, parts: Sequence[Any]) -> Tensor:
        """Return the loss divisors (D,) over the micro-batches of all ranks."""
        divisors = [self._criterion.divisors(part).to(self._engine.device, torch.float32) for part in parts]
        return self._engine.sum(torch.stack(divisors).sum(0))

    def _start_again(self, output: StepOutput) -> None:
        """Revert what the step has changed, free its memory, and restore its random state."""
        self._shortage = None
        self._undo()
        # objects in circles of references keep their tensors until the collector runs, and only unused memory is
        # returned
        gc.collect()
        if self._engine.device.type != "cpu":
            torch.get_device_module(self._engine.device).empty_cache()
        # the seed of this step (`Engine.seed`), so that the retry draws the same dropout
        torch.manual_seed(torch.initial_seed())
        output.restart()

    def _halve(self, reason: str, samples: int) -> None:
        """Halve the micro-batches of batches of this size.

        Raises:
            OutOfMemory: they cannot be smaller.
        """
        # a head may need several samples: BatchNorm of maps of one cell needs two
        parts = min(2 * self._parts, samples // self._smallest)
        size = -(-samples // self._parts)
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
