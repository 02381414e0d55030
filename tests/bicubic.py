"""Bicubic interpolation written out in float64."""

import math

import torch


def cubic(distance, a=-0.75):
    """Keys' cubic convolution."""
    distance = abs(distance)
    if distance < 1:
        return (a + 2) * distance**3 - (a + 3) * distance**2 + 1
    if distance < 2:
        return a * (distance**3 - 5 * distance**2 + 8 * distance - 4)
    return 0.0


def cubic_matrix(cells, scale, length):
    """Return the weights (length, cells) of an axis that is resized; the border is repeated."""
    matrix = torch.zeros(length, cells, dtype=torch.float64)
    for row in range(length):
        position = (row + 0.5) / scale - 0.5
        for tap in range(math.floor(position) - 1, math.floor(position) + 3):
            matrix[row, min(max(tap, 0), cells - 1)] += cubic(position - tap)
    return matrix
