"""Progress of a run, and which validation is its best."""

import math
from dataclasses import dataclass, replace


@dataclass
class Progress:
    """Progress of a run."""

    step: int = 0  # optimizer steps done
    # best validation score so far: the mean of the finite images if `best_infinite` others have an infinite value
    best: float | None = None
    best_infinite: int = 0
    best_step: int = 0
    stale: int = 0  # validations since the best one
    validation_pending: bool = False  # whether a validation is pending at this step: a resumed run starts with it

    @property
    def has_best(self) -> bool:
        """Whether a validation has selected a checkpoint."""
        return self.best is not None or self.best_infinite > 0

    def rank(self, *, lowest: bool) -> tuple[float, float]:
        """Return the sort key of the best score: fewer infinite images first, then the better mean of the others."""
        if self.best is None:
            return self.best_infinite or math.inf, math.inf
        return self.best_infinite, self.best if lowest else -self.best

    def after_validation(self, score: float | None, infinite: int = 0, *, lowest: bool) -> "Progress":
        """Return the progress after a validation.

        Args:
            score: of the images of finite value; None if there are none.
            infinite: number of images of infinite value.
            lowest: whether the lowest score is the best.
        """
        found = Progress(self.step, best=score, best_infinite=infinite, best_step=self.step)
        if found.rank(lowest=lowest) < self.rank(lowest=lowest):
            return found
        return replace(self, stale=self.stale + 1, validation_pending=False)
