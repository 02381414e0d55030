"""Slot contrast: a slot must be told from all others by what it is in the next frame."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dinoseg.core.contracts import Loss
from dinoseg.core.shapes import Batch, ClipBatch, Prediction
from dinoseg.losses.feature_reconstruction import slot_outputs
from dinoseg.utils.errors import UserError
from dinoseg.utils.precision import at_least_float32
from dinoseg.utils.ranges import Temperature


class SlotContrast(Loss):
    """Contrast of each slot with the slots of the next frame (Manasyan et al., SlotContrast, arXiv 2412.14295).

    Cross-entropy of the cosine similarities of a slot with all slots of the next frame, those of the other clips of the
    batch among them; the slot's own is the one at its place. The mean over slots, clips and pairs of frames. It is 0
    where slots are not carried from frame to frame: which one has which place is then chance.

    Args:
        temperature: what similarities are divided by.
    """

    needs_slots = True
    divisor = "clips"  # all have the same length, so that means over frames are divided by the number of clips
    needs_carried = True
    sums_over_batch = True

    def __init__(self, temperature: Temperature = 0.1) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, prediction: Prediction, batch: Batch | ClipBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, and `weight`: the number of frames with a next one, over all clips.

        Raises:
            UserError: the head has no slots, or a single frame of each clip tells.
        """
        outputs = slot_outputs(prediction)
        slots = F.normalize(at_least_float32(outputs.slots), dim=-1)
        clips, frames, count = slots.shape[:3]
        if frames < 2:
            raise UserError(
                f"One frame of each clip has slots, and the loss compares those of two: set data.clips.cut.length to "
                f"{max(outputs.steps) + 2} or more. For images choose loss=feature_reconstruction."
            )
        weight = slots.new_full((), clips * (frames - 1))
        if not outputs.carried:
            return (outputs.slots.sum() * 0.0).abs(), {"weight": weight}  # no -0.0, which would be told
        here, following = (part.transpose(0, 1).flatten(1, 2) for part in (slots[:, :-1], slots[:, 1:]))
        logits = here @ following.mT / self.temperature  # (T' - 1, B S, B S)
        own = torch.arange(clips * count, device=logits.device).expand(frames - 1, -1)
        return F.cross_entropy(logits.flatten(0, 1), own.flatten()), {"weight": weight}
