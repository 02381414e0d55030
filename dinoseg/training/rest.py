"""A backbone that rests: until its share of the training is done, the head learns on features that stay as they are."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.optim import Optimizer

from dinoseg.core.contracts import Backbone
from dinoseg.core.shapes import FrozenFeatures
from dinoseg.training.optim import Pace

logger = logging.getLogger(__name__)


class Rest:
    """Lets the trained parts of a backbone rest, as their groups say.

    What rests is in eval mode, as what is frozen is, and has no gradient: none is computed on one rank. Several ranks
    expect those of all that is trained, and features that are kept enter where what is trained begins, which would move
    with them: there they are computed, and dropped.

    Args:
        backbone: of the model in training.
        optimizer: over `parameter_groups`.
        alone: whether there is one rank.
    """

    def __init__(self, backbone: Backbone, optimizer: Optimizer, *, alone: bool) -> None:
        self._backbone, self._alone = backbone, alone
        self._groups = [group for group in optimizer.param_groups if group["rests"]]
        self._was_frozen = False

    @property
    def begin(self) -> float:
        """The share of the training until which something is frozen."""
        return max((group["begin"] for group in self._groups), default=0.0)

    def tell(self, pace: Pace) -> None:
        """Say for how many steps something rests, and on one rank that those after them take longer."""
        steps, to_come = max((pace.left(group["begin"]) for group in self._groups), default=0), pace.steps - pace.step
        if steps and steps == to_come:
            logger.warning(
                "The backbone rests for all of the %d steps to come, and learns nothing. Give a lower "
                "optim.optimizer.backbone_begin, or adapter=frozen, which keeps features.",
                steps,
            )
        elif steps:
            quicker = ", which take less time than those after them" if self._alone else ""
            logger.info("The backbone rests for %d of the %d steps to come%s.", steps, to_come, quicker)

    def ends_with(self, pace: Pace) -> bool:
        """Return whether a step is the last one of a rest, or the first one after a rest that fewer steps cut short.

        Args:
            pace: of each step in turn.
        """
        left = [pace.left(group["begin"]) for group in self._groups]
        was_frozen, self._was_frozen = self._was_frozen, max(left, default=0) > 1
        return 1 in left or (was_frozen and not any(left))

    @contextmanager
    def during(self, pace: Pace, images: Any) -> Iterator[None]:
        """Let them rest while a model goes forward and backward through images, or through features of images."""
        resting = [each for group in self._groups if pace.left(group["begin"]) for each in group["params"]]
        if not resting:
            yield
            return
        learning = [part for part in self._backbone.modules() if part.training]
        self._backbone.eval()
        for parameter in resting:
            parameter.requires_grad_(not self._alone or isinstance(images, FrozenFeatures))
        try:
            yield
        finally:
            for parameter in resting:
                parameter.requires_grad_(True)
                parameter.grad = None
            for part in learning:
                part.training = True
