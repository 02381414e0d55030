"""One-to-one assignment with the greatest total score."""

import numpy as np
from scipy.optimize import linear_sum_assignment


def best_assignment(scores: np.ndarray) -> np.ndarray:
    """Return a distinct column for each row of scores (R, C), R <= C, so that the total score is greatest."""
    return linear_sum_assignment(scores, maximize=True)[1]
