"""Conformance of losses that train slots: random outputs for `dinoseg.testing.check_loss`."""

from typing import Any

import torch

from dinoseg.extensions.slots.contract import OUTPUTS, SlotOutputs
from dinoseg.testing.losses import IMAGES, SIZE, LossCase

FRAMES = 3


class SlotLossCase(LossCase):
    """A loss on slots under test, with the outputs that it takes: `check_loss(MyLoss, case=SlotLossCase)`."""

    provides = OUTPUTS
    has_labels = False

    def outputs(self, count: int = IMAGES, size: tuple[int, int] = SIZE, dtype: torch.dtype = torch.float32) -> Any:
        """Return random outputs of a slot head; those that a loss may train require gradients."""
        draw = self.make_draw(count, dtype)
        return SlotOutputs(
            features=draw(FRAMES, 5, *size).detach(),
            reconstructions=[draw(FRAMES, 5, *size)],
            alphas=[draw(FRAMES, 2, *size).detach().softmax(2)],
            attention=draw(FRAMES, 2, *size).detach().softmax(2),
            slots=draw(FRAMES, 2, 6),
            steps=[0],
            similarity=draw(FRAMES, size[0] * size[1], *size),
        )
