"""Class weights from pixel counts."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dinoseg.errors import UserError
from dinoseg.ranges import LowShare

SCHEMES = ("none", "one_minus_frequency", "inverse", "median", "effective_number")


def class_weights(counts: Sequence[int], scheme: str, *, beta: LowShare = 0.9999) -> Tensor:
    """Return one weight (K,) float32 per class from the pixels counted over the training masks.

    With f the share of a class among all labelled pixels: `one_minus_frequency` is 1 - f; `inverse` is 1 / f
    and `median` is median(f) / f over the classes that occur (Eigen and Fergus, arXiv 1411.4734);
    `effective_number` is (1 - beta) / (1 - beta^n), n the count in units of 10,000 pixels (Cui et al., arXiv
    1901.05555). The last three are scaled to a mean of 1 over the classes that occur. A class that never
    occurs gets 1: nothing in training asks for it.

    Raises:
        UserError: an unknown scheme, or no labelled pixel at all.
    """
    if scheme not in SCHEMES:
        raise UserError(f"loss.weights={scheme} is unknown. Choose one of {', '.join(SCHEMES)}.")
    n = torch.tensor(counts, dtype=torch.float64)
    if scheme == "none":
        return torch.ones(len(n))
    if n.sum() == 0:
        raise UserError(f"loss.weights={scheme}: the training masks hold no labelled pixel. Check the masks.")
    frequency = n / n.sum()
    present = n > 0
    if scheme == "one_minus_frequency":
        weights = 1 - frequency
    elif scheme == "inverse":
        weights = _mean_one(1 / frequency, present)
    elif scheme == "median":
        weights = _mean_one(frequency[present].median() / frequency, present)
    else:
        weights = _mean_one((1 - beta) / (1 - beta ** (n / 1e4)), present)
    return torch.where(present, weights, 1.0).float()


def _mean_one(weights: Tensor, present: Tensor) -> Tensor:
    return weights / weights[present].mean()
