"""Slot contrast loss: each slot must match itself in the next frame, among all other slots."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dinoseg.core.contracts import Loss
from dinoseg.core.shapes import Prediction, StackedSamples
from dinoseg.extensions.slots.losses.feature_reconstruction import ADVICE, slot_outputs
from dinoseg.utils.errors import UserError
from dinoseg.utils.precision import at_least_float32
from dinoseg.utils.ranges import Temperature, check_annotations


class SlotContrast(Loss):
    """Contrast of each slot with the slots of the next frame (Manasyan et al., SlotContrast, arXiv 2412.14295).

    It is the cross-entropy of the cosine similarities of a slot with all slots of the next frame, in all clips of the
    batch; the target is the slot with the same index in the same clip. It is averaged over slots, clips and pairs of
    frames. It is 0 if slots are not carried from frame to frame, since their order is then arbitrary.

    With `softmax_over=previous`, the softmax runs over the slots of frame t for each slot of frame t + 1, as in the
    published code (martius-lab/slotcontrast, slotcontrast/losses.py), where the class axis of the cross-entropy holds
    the slots of frame t.

    Args:
        temperature: divisor of the similarities.
        softmax_over: frame whose slots share the softmax: `next` or `previous`.

    Raises:
        UserError: unknown frame.
    """

    needs = frozenset({"slots", "carried"})
    advice = ADVICE
    divisor = "clips"  # equal clip lengths: a mean over frames is a mean over clips
    sums_over_batch = True

    @check_annotations
    def __init__(self, temperature: Temperature = 0.1, softmax_over: Literal["next", "previous"] = "next") -> None:
        super().__init__()
        self.softmax_over = softmax_over
        self.temperature = temperature

    def forward(self, prediction: Prediction, batch: StackedSamples) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, and `weight`: the number of frames with a next one, over all clips.

        Raises:
            UserError: the head has no slots, or clips have a single source frame.
        """
        outputs = slot_outputs(prediction)
        slots = F.normalize(at_least_float32(outputs.slots), dim=-1)
        clips, frames, count = slots.shape[:3]
        if frames < 2:
            raise UserError(
                "The loss compares the slots of two frames, but only one frame of each clip has slots. Give clips of "
                f"{max(outputs.steps) + 2} frames or more; feature_reconstruction takes single frames."
            )
        weight = slots.new_full((), clips * (frames - 1))
        if not outputs.carried:
            # a zero that depends on the slots: DDP expects a gradient for every weight
            return (outputs.slots.sum() * 0.0).abs(), {"weight": weight}  # abs avoids logging -0.0
        # the slots of all clips in one row: those of other clips are negatives, too, as in the published code
        current, following = (part.transpose(0, 1).flatten(1, 2) for part in (slots[:, :-1], slots[:, 1:]))
        logits = current @ following.mT / self.temperature  # (T' - 1, B S, B S)
        if self.softmax_over == "previous":
            logits = logits.mT
        targets = torch.arange(clips * count, device=logits.device).expand(frames - 1, -1)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten()), {"weight": weight}
