"""One-to-one assignments with the greatest total score: of any scores, and of objects to tracks by IoU."""

import numpy as np
from scipy.optimize import linear_sum_assignment

MIN_IOU = 0.5  # of an object and the mask of its track


def best_assignment(scores: np.ndarray) -> np.ndarray:
    """Return a distinct column for each row of scores (R, C), R <= C, so that the total score is greatest."""
    return linear_sum_assignment(scores, maximize=True)[1]


def match_objects(iou: np.ndarray, is_same: np.ndarray) -> list[tuple[int, int]]:
    """Return pairs of a track and an object, such that the sum of their IoU is greatest.

    Args:
        iou: (M, N) of tracks and objects; that of a pair is at least 0.5.
        is_same: (M, N) bool, whether they have the same class, as a pair has.
    """
    is_pair = (iou >= MIN_IOU) & is_same
    # the solver pairs every row or every column; what it pairs at 0 is dropped
    rows, columns = linear_sum_assignment(np.where(is_pair, iou, 0.0), maximize=True)
    return [(row, column) for row, column in zip(rows.tolist(), columns.tolist(), strict=True) if is_pair[row, column]]
