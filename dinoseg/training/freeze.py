"""Delayed fine-tuning: until a share of the training is done, the backbone is frozen and only the head is trained."""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.optim import Optimizer

from dinoseg.core.contracts import Backbone
from dinoseg.core.shapes import FrozenFeatures
from dinoseg.training.optim import Schedule

logger = logging.getLogger(__name__)


class BackboneFreeze:
    """Freeze of the trained parts of a backbone until a share of the training.

    Frozen parts are in eval mode and have no gradient. On one rank, none is computed. A gradient is computed and
    dropped with several ranks, which expect gradients of all trained parameters, and with cached features. These enter
    the model at its first trained block, which would change if parameters no longer required gradients.

    Args:
        backbone: of the model in training.
        parameters: of the backbone that are trained.
        until: share of the training.
        is_single: whether there is only one rank.
    """

    def __init__(
        self, backbone: Backbone, parameters: Sequence[nn.Parameter], until: float, *, is_single: bool
    ) -> None:
        self._backbone, self._parameters, self.until = backbone, parameters, until
        self._is_single = is_single

    def length(self, steps: int) -> int:
        """Return the number of steps for which the backbone is frozen, in a training of this length."""
        # rounded first, since 0.07 * 100 > 7 in floating point
        return math.ceil(round(self.until * steps, 6))

    def restart(self, schedule: Schedule) -> Schedule:
        """Return the schedule of two trainings, of the head and then of the whole model; each is a full schedule."""

        def factor(step: int, steps: int, backbone: bool = False, /) -> float:
            first = self.length(steps)
            # the head's rate starts again, too, since its features change from here on
            if step >= first:
                return schedule(step - first, steps - first, backbone)
            return 0.0 if backbone else schedule(step, first)

        return factor

    def log_length(self, step: int, steps: int) -> None:
        """Log for how many steps the backbone is frozen and, on one rank, that the steps after these take longer."""
        frozen, to_come = self.length(steps) - step, steps - step
        if frozen <= 0:
            return
        if frozen == to_come:
            logger.warning(
                "The backbone is frozen for all of the %d remaining steps. Set a lower "
                "optim.optimizer.freeze_backbone_until, or adapter=frozen, which allows a feature cache.",
                frozen,
            )
        else:
            quicker = ", which take less time than later steps" if self._is_single else ""
            logger.info("The backbone is frozen for %d of the %d remaining steps%s.", frozen, to_come, quicker)

    @contextmanager
    def apply(self, step: int, steps: int, images: Any) -> Iterator[None]:
        """Freeze the parts while a model runs forward and backward on images, or on features of images."""
        if step >= self.length(steps):
            yield
            return
        training = [part for part in self._backbone.modules() if part.training]
        # features that the head is trained on must not change: no dropout, no update of running means
        self._backbone.eval()
        for parameter in self._parameters:
            # the backward pass then ends at the head: with a linear one, the rest is half of a step or more
            # (docs/log/speed.md)
            parameter.requires_grad_(not self._is_single or isinstance(images, FrozenFeatures))
        try:
            yield
        finally:
            for parameter in self._parameters:
                parameter.requires_grad_(True)
                # a gradient, even of 0, would let AdamW decay and move these weights
                parameter.grad = None
            for part in training:
                part.training = True


def build_freeze(backbone: Backbone, optimizer: Optimizer, *, is_single: bool) -> BackboneFreeze | None:
    """Return the freeze that is set in the optimizer's groups of a backbone; None if it is trained from the start."""
    groups = [group for group in optimizer.param_groups if group["backbone"]]
    until = max((group["frozen_until"] for group in groups), default=0.0)
    if not until:
        return None
    parameters = [parameter for group in groups for parameter in group["params"]]
    return BackboneFreeze(backbone, parameters, until, is_single=is_single)
