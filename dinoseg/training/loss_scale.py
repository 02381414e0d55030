"""Dynamic loss scaling, which keeps gradients of float16 layers in range (arXiv 1710.03740)."""

import math
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor

from dinoseg.core.shapes import tree_map
from dinoseg.utils.precision import at_least_float32

T = TypeVar("T")
_FIRST = 2.0**16  # for the mean loss, as in torch's GradScaler
_LARGEST = 2.0**60
_GROWS_AFTER = 2000  # steps without an overflow
_MAX_OVERFLOWS = 40  # consecutive steps, after which the gradient itself is considered infinite


class LossScale:
    """Factor of losses before their backward pass: halved when gradients overflow, doubled after 2000 steps without.

    It stays on the device, to avoid a sync. `begin` sets it once the weight of a first batch is known. That is because
    losses are sums over pixels or samples, and are divided by their weight only after the backward pass.

    Attributes:
        started: whether `begin` or `restore` has set the scale permanently.
        value: () float32.
        steady: () float32, steps since the last overflow; negative: number of consecutive overflows.
    """

    started = False
    value: Tensor
    steady: Tensor

    def begin(self, weight: float, device: torch.device) -> None:
        """Set the scale that suits losses of this total weight; if the weight is 0, the next batch sets it again."""
        # a power of two, which rounds no gradient; a sum over `weight` times this scale is about 2^16 times the mean
        self._set(_FIRST / 2 ** math.ceil(math.log2(max(1.0, weight))), 0.0, device)
        # without labels, loss and gradients are 0 whatever the scale
        self.started = weight > 0

    def skip_overflow(self, mean: Tensor, norm: Tensor) -> Tensor:
        """Return the gradient norm () of a step, or 0 if its loss is finite but its gradient is not; update the scale.

        After 40 such steps in a row the step is not skipped but left to fail: no scale helps.
        """
        # a loss that is not finite itself is no overflow: the scale multiplies it only afterwards
        overflow = mean.isfinite() & ~norm.isfinite() & (self.steady > -_MAX_OVERFLOWS).to(mean.device)
        self.update(overflow)
        return norm.masked_fill(overflow, 0.0)

    def update(self, overflow: Tensor) -> None:
        """Update the scale for the next step; `overflow`, () bool, states whether this step has overflowed."""
        overflow = overflow.to(self.value.device)
        # one tensor counts both streaks, by its sign, and `where` replaces branches, which would wait for the device
        steady = torch.where(overflow, self.steady.clamp(max=0) - 1, self.steady.clamp(min=0) + 1)
        grows = steady >= _GROWS_AFTER
        factor = torch.where(overflow, 0.5, torch.where(grows, 2.0, 1.0)).to(self.value)
        self.value, self.steady = (self.value * factor).clamp(max=_LARGEST), steady.masked_fill(grows, 0)

    def state(self) -> dict[str, Tensor]:
        """Return the tensors for a checkpoint; none before the first batch with labels."""
        return {"value": self.value, "steady": self.steady} if self.started else {}

    def restore(self, state: dict[str, Tensor], device: torch.device) -> None:
        """Load the tensors that `state` returned; there are none if the run was not in float16."""
        if state:
            self._set(state["value"].item(), state["steady"].item(), device)

    def _set(self, value: float, steady: float, device: torch.device) -> None:
        self.value, self.steady = torch.full((), value, device=device), torch.full((), steady, device=device)
        self.started = True


def widen_predictions(predictions: T) -> T:
    """Return predictions in float32: a loss sums over pixels, which overflows float16."""
    return tree_map(predictions, cache(at_least_float32))  # shared tensors stay shared
