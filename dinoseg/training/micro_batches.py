"""Micro-batches of a training step, which are halved and run again when memory does not suffice."""

import gc
import logging
from collections.abc import Callable, Iterable, Iterator
from itertools import islice, tee
from typing import Any, TypeVar

import torch

from dinoseg.inference.memory import OutOfMemory, reason_of, tells_shortage
from dinoseg.training.engine import Engine
from dinoseg.utils.devices import empty_cache
from dinoseg.utils.wording import count_of

logger = logging.getLogger(__name__)
T = TypeVar("T")


class MicroBatches:
    """Splitter of a step's batches into parts: one at first, and twice the number whenever memory is short.

    The update is still over the same samples. With several ranks nothing is split: ranks would wait for one another.

    Args:
        engine: device and ranks.
        accumulate: batches per optimizer step.
        least: minimum number of samples in a part.
        undo: reverts what a step has changed when it ends before its update.
        several: whether other heads are trained on the same features.
        sums_over_batch: whether the loss of a batch is not the mean of the losses of its parts.
    """

    def __init__(
        self,
        engine: Engine,
        accumulate: int,
        least: int,
        undo: Callable[[], None],
        *,
        several: bool = False,
        sums_over_batch: bool = False,
    ) -> None:
        self.parts = 1
        self._several, self._sums_over_batch = several, sums_over_batch
        self._engine, self._accumulate, self._least, self._undo = engine, accumulate, least, undo
        self._samples = 0  # in the latest batch

    def through(self, work: Callable[[Iterator[Any], int], T], batches: Iterator[Any]) -> T:
        """Call `work` with the parts of the next step's batches and their number, and return its result.

        If memory does not suffice, the step is run again from its start, with smaller parts and the same random draws.

        Raises:
            OutOfMemory: parts cannot be smaller.
        """
        taken: Iterator[Any] = islice(batches, self._accumulate)
        while True:
            taken, again = tee(taken)
            try:
                return work(self._in_parts(taken), self._accumulate * self.parts)
            except (MemoryError, RuntimeError) as error:
                if not tells_shortage(error):
                    raise
                self._halve(reason_of(error))
            # outside `except`, whose traceback holds the step's tensors
            self._undo()
            self._free()
            torch.manual_seed(torch.initial_seed())
            taken = again

    def _in_parts(self, batches: Iterable[Any]) -> Iterator[Any]:
        for batch in batches:
            self._samples = len(batch.names)
            yield from batch.split(self.parts) if self.parts > 1 else [batch]

    def _halve(self, reason: str) -> None:
        parts = min(2 * self.parts, self._samples // self._least)
        size = -(-self._samples // self.parts)
        if parts <= self.parts or self._engine.world > 1:
            raise OutOfMemory(
                f"There is not enough memory to train on {count_of(size, 'sample')} at once ({reason}). {self._remedy}"
            )
        logger.warning(
            "Memory does not suffice to train on %s at once (%s). From here on a batch goes through in %d parts; each "
            "update is over the same samples. BatchNorm takes its statistics over a part%s.",
            count_of(size, "sample"),
            reason,
            parts,
            ", and the loss its sums" if self._sums_over_batch else "",
        )
        self.parts = parts

    @property
    def _remedy(self) -> str:
        if self._several:
            return (
                "Give fewer heads, less data.batch_size, or a smaller resolution.crop; mode=plan with head=NAME, "
                "without heads and trainer, says what one takes."
            )
        accumulate = "less data.batch_size with as much more trainer.accumulate, " if self._engine.world > 1 else ""
        return (
            f"Give {accumulate}backbone.checkpointing=true, or a smaller resolution.crop; mode=plan in place of "
            "mode=train says what fits."
        )

    def _free(self) -> None:
        gc.collect()
        empty_cache(self._engine.device)
