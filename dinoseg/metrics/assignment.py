"""One-to-one assignment of greatest summed score."""

import numpy as np
from scipy.optimize import linear_sum_assignment


def best_assignment(scores: np.ndarray) -> np.ndarray:
    """Return for each row of (R, C), R <= C, a column of its own, so that the summed score is greatest.

    Raises:
        ValueError: there are more rows than columns, or a score is not a number.
    """
    if len(scores) > scores.shape[1]:
        raise ValueError(f"{len(scores)} rows cannot each have a column of their own among {scores.shape[1]}.")
    return linear_sum_assignment(scores, maximize=True)[1]
