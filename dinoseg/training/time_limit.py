"""Wall-clock limit of a training, which reduces the number of steps if they take longer than planned."""

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
    """Wall-clock limit, which reduces the number of steps so that a training ends, validated, in time.

    The limit counts from the construction, also in a resumed run. A training that is on schedule is not changed.

    Args:
        minutes: the limit.
        engine: of the run; all ranks use rank 0's clock.
        frozen_until: share of the steps until which a part is frozen. If it is still frozen after this share of the
            limit, the number of steps is reduced at once. The part is then trained for the remaining share.
        clock: returns seconds.
    """

    def __init__(
        self,
        minutes: float,
        engine: Engine,
        *,
        frozen_until: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._minutes, self._engine, self._clock = minutes, engine, clock
        self._frozen_until = frozen_until
        self._began = clock()
        self._mark: float | None = None  # end of the previous step; None before the first one
        self._durations: deque[float] = deque(maxlen=_RECENT)
        self._fitted: int | None = None  # number of planned steps that fit
        self._validation, self._is_validated, self._is_reported = 0.0, False, False

    def fit_steps(self, step: int, steps: int) -> int:
        """Return the number of `steps` after which the training has to end; `step`: now, without another step.

        Call it before each step. The training is validated after the last one. The number never rises, so that neither
        the learning rate nor a frozen part returns to an earlier state.

        Args:
            step: 0-based number of the next step.
            steps: planned number of steps.
        """
        fitting = self._engine.run_on_rank0(lambda: self._fit(step, steps))
        if fitting < steps and not self._is_reported:
            self._is_reported = True
            logger.warning(
                "The time limit is too short for all steps: about %d instead of %d fit into trainer.max_minutes=%.3g. "
                "The learning rate follows the shorter schedule.",
                fitting,
                steps,
                self._minutes,
            )
        return fitting

    def seconds_left(self) -> float:
        """Return the seconds until the limit, at least 0."""
        return max(0.0, 60 * self._minutes - (self._clock() - self._began))

    @contextmanager
    def measure_validation(self) -> Iterator[None]:
        """Measure a validation, for which time is reserved at the end."""
        began = self._clock()
        yield
        seconds = self._clock() - began
        self._validation = max(self._validation, seconds)
        self._is_validated = True
        if self._mark is not None:
            # the validation is no part of the next step's duration
            self._mark += seconds

    def _fit(self, step: int, steps: int) -> int:
        now, limit = self._clock(), 60 * self._minutes
        if self._mark is not None:
            self._durations.append(now - self._mark)
        self._mark, is_validated, self._is_validated = now, self._is_validated, False
        self._fitted = min(steps, steps if self._fitted is None else self._fitted)
        is_frozen = step < self._frozen_until * self._fitted
        # still frozen after its share of the limit: reduce now, so that the part is trained for the rest of the time
        watched = min(_WATCHED, self._frozen_until) if is_frozen else _WATCHED
        left = limit - (now - self._began) - self._validation
        if not self._durations or left > (1 - watched) * limit:
            return self._fitted
        # these weights are validated already, and another step would need a validation of its own
        if is_validated and left < fmean(self._durations):
            self._fitted = step
        # at least one more step: the end is validated after a last step
        self._fitted = min(self._fitted, step + max(1, int(left / fmean(self._durations))))
        return self._fitted
