"""Delayed fine-tuning: until a share of the training is done, the backbone is frozen and only the head is trained."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.optim import Optimizer

from dinoseg.core.contracts import Backbone
from dinoseg.core.shapes import FrozenFeatures
from dinoseg.training.optim import ScheduleState

logger = logging.getLogger(__name__)


class BackboneFreeze:
    """Freeze of the trained parts of a backbone until the time set in their parameter groups.

    Frozen parts are in eval mode and have no gradient. On one rank, none is computed. A gradient is computed and
    dropped with several ranks, which expect gradients of all trained parameters, and with cached features. These enter
    the model at its first trained block, which would change if parameters no longer required gradients.

    Args:
        backbone: of the model in training.
        optimizer: over `parameter_groups`.
        is_single: whether there is only one rank.
    """

    def __init__(self, backbone: Backbone, optimizer: Optimizer, *, is_single: bool) -> None:
        self._backbone, self._is_single = backbone, is_single
        self._groups = [group for group in optimizer.param_groups if group["backbone"]]

    @property
    def until(self) -> float:
        """Return the share of the training until which something is frozen."""
        return max((group["start"] for group in self._groups), default=0.0)

    def log_length(self, position: ScheduleState) -> None:
        """Log for how many steps the backbone is frozen and, on one rank, that the steps after these take longer."""
        steps, to_come = (
            max((position.left(group["start"]) for group in self._groups), default=0),
            position.steps - position.step,
        )
        if steps and steps == to_come:
            logger.warning(
                "The backbone is frozen for all of the %d remaining steps. Set a lower "
                "optim.optimizer.freeze_backbone_until, or adapter=frozen, which allows a feature cache.",
                steps,
            )
        elif steps:
            quicker = ", which take less time than later steps" if self._is_single else ""
            logger.info("The backbone is frozen for %d of the %d remaining steps%s.", steps, to_come, quicker)

    @contextmanager
    def during(self, position: ScheduleState, images: Any) -> Iterator[None]:
        """Freeze the parts while a model runs forward and backward on images, or on features of images."""
        frozen = [each for group in self._groups if position.left(group["start"]) for each in group["params"]]
        if not frozen:
            yield
            return
        training = [part for part in self._backbone.modules() if part.training]
        self._backbone.eval()
        for parameter in frozen:
            parameter.requires_grad_(not self._is_single or isinstance(images, FrozenFeatures))
        try:
            yield
        finally:
            for parameter in frozen:
                parameter.requires_grad_(True)
                parameter.grad = None
            for part in training:
                part.training = True
