"""A wall-clock limit on a training: fewer steps where they take longer than planned."""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import fmean

from dinoseg.training.engine import Engine

logger = logging.getLogger(__name__)
_WATCHED = 0.8  # share of the limit after which steps are dropped: cached features make early steps the slow ones
_RECENT = 16  # steps whose mean duration estimates the next ones


class TimeLimit:
    """Reduce the number of steps so that a training ends, validated, within its wall-clock limit.

    The limit counts from here, also in a resumed run. A training that keeps up with its plan is not changed.

    Args:
        minutes: the limit; None: there is none.
        engine: of the run; all ranks follow the first one's clock.
        clock: returns seconds.
    """

    def __init__(self, minutes: float | None, engine: Engine, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._minutes, self._engine, self._clock = minutes, engine, clock
        self._began = clock()
        self._mark: float | None = None  # end of the step before; None: there was none
        self._durations: deque[float] = deque(maxlen=_RECENT)
        self._validation, self._is_validated, self._is_reported = 0.0, False, False

    def fit_steps(self, step: int, steps: int) -> int:
        """Return in how many of `steps` the training has to end; `step` itself: now, without another step.

        Call it before each step. The training is validated after the last one.
        """
        if self._minutes is None:
            return steps
        fitting = self._engine.decided(lambda: self._fit(step, steps))
        if fitting < steps and not self._is_reported:
            self._is_reported = True
            logger.warning(
                "Steps take longer than planned: about %d instead of %d fit into trainer.max_minutes=%.3g. The "
                "learning rate follows the shorter schedule.",
                fitting,
                steps,
                self._minutes,
            )
        return fitting

    @contextmanager
    def validating(self) -> Iterator[None]:
        """Measure a validation, for which time is reserved at the end."""
        began = self._clock()
        yield
        seconds = self._clock() - began
        self._validation, self._is_validated = max(self._validation, seconds), True
        if self._mark is not None:
            self._mark += seconds

    def _fit(self, step: int, steps: int) -> int:
        assert self._minutes is not None
        now, limit = self._clock(), 60 * self._minutes
        if self._mark is not None:
            self._durations.append(now - self._mark)
        self._mark, is_validated, self._is_validated = now, self._is_validated, False
        left = limit - (now - self._began) - self._validation
        if not self._durations or now - self._began < _WATCHED * limit - self._validation:
            return steps
        if is_validated and left < fmean(self._durations):
            return step
        return min(steps, step + max(1, int(left / fmean(self._durations))))
