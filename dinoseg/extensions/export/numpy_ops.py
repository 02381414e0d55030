"""Operations on the outputs of a graph in numpy."""

import numpy as np


def bilinear_matrix(length: int, cells: int, share: float) -> np.ndarray:
    """Return the weights (length, cells) with which `length` pixels read `cells`, as `geometry.upsample` does.

    Args:
        length: pixels along a side of the image.
        cells: along the same side of the grid.
        share: of the grid that the image covers, from its start.
    """
    positions = np.clip((np.arange(length) + 0.5) * cells * share / length - 0.5, 0, cells - 1)
    distance = np.abs(positions[:, None] - np.arange(cells))
    return np.clip(1 - distance, 0, None).astype(np.float32)


def softmax(logits: np.ndarray, axis: int = 0) -> np.ndarray:
    """Return the softmax of logits over an axis."""
    raised = np.exp(logits - logits.max(axis=axis, keepdims=True))
    return raised / raised.sum(axis=axis, keepdims=True)


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Return the logistic function of logits, without overflow."""
    return 0.5 * (np.tanh(0.5 * logits) + 1)
