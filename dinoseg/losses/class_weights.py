"""Class weights, computed from pixel counts or given by name."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import numpy as np
import torch
from torch import Tensor

from dinoseg.utils.errors import UserError
from dinoseg.utils.ranges import LowShare, Range, check_annotations
from dinoseg.utils.wording import format_text, join_names

_NAMED = 30  # maximum number of classes listed in a message
Scheme = Literal["none", "one_minus_frequency", "inverse", "median", "effective_number"]
# float32 sums stay accurate
Weight = Annotated[float, Range("a number from 1e-6 to 1e6 (1 is neutral)", 1e-6, 1e6)]


@check_annotations
def class_weights(
    counts: Sequence[int] | np.ndarray,
    classes: Sequence[str],
    scheme: Scheme | Mapping[str, Weight],
    *,
    beta: LowShare = 0.9999,
) -> Tensor:
    """Return one weight (K,) float32 per class, by a scheme from the pixel counts of the training masks.

    Let f be the share of a class among all labelled pixels. `one_minus_frequency` is 1 - f; `inverse` is 1 / f and
    `median` is median(f) / f over the classes that occur (Eigen and Fergus, arXiv 1411.4734). `effective_number` is
    (1 - beta) / (1 - beta^n), n the count in units of 10,000 pixels (Cui et al., arXiv 1901.05555). The last three
    are scaled to a mean of 1 over the classes that occur. A class that never occurs gets 1, which has no effect in
    training.

    Weights may also be given by class name; these are used unchanged, and classes without one get 1.

    Raises:
        UserError: unknown scheme, no labelled pixel, unknown class name, or a weight outside 1e-6 to 1e6.
    """
    if isinstance(scheme, Mapping):
        named = {str(name): float(weight) for name, weight in scheme.items()}  # YAML parses a class named 1 as a number
        unknown = [name for name in named if name not in classes]
        if unknown:
            raise UserError(
                f"scheme: {format_text(unknown[0])} is not a class. The classes are {join_names(classes, _NAMED)}. "
                "Give weights for these only; scheme=none weights all classes equally."
            )
        return torch.tensor([named.get(name, 1.0) for name in classes])
    # pixels of a data set exceed 2^24, up to which float32 is exact
    n = torch.tensor(counts, dtype=torch.float64)
    if scheme == "none":
        return torch.ones(len(n))
    if not n.any():
        raise UserError(f"scheme={scheme}: the training masks hold no labelled pixel. Check the masks.")
    frequency = n / n.sum()
    present = n > 0
    if scheme == "one_minus_frequency":
        weights = 1 - frequency
    elif scheme == "inverse":
        weights = _mean_one(1 / frequency, present)
    elif scheme == "median":
        weights = _mean_one(frequency[present].median() / frequency, present)
    else:
        # 10,000 pixels are one sample: with single ones, beta^n would be 0 for any class of a million pixels
        weights = _mean_one((1 - beta) / (1 - beta ** (n / 1e4)), present)
    return torch.where(present, weights, 1.0).float()


def _mean_one(weights: Tensor, present: Tensor) -> Tensor:
    return weights / weights[present].mean()
