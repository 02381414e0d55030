"""Feature reconstruction: slots must tell what the backbone saw, in their own frame and in later ones."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dinoseg.core.contracts import Loss
from dinoseg.core.shapes import Batch, ClipBatch, Prediction, SlotOutputs
from dinoseg.utils.errors import UserError
from dinoseg.utils.precision import at_least_float32


def slot_outputs(prediction: Prediction) -> SlotOutputs:
    """Return the outputs of a slot head.

    Raises:
        UserError: another head made them.
    """
    if not isinstance(prediction.outputs, SlotOutputs):
        raise UserError(
            "loss=feature_reconstruction, video_similarity and slot_contrast learn slots and need head=slots. "
            "For other heads choose a loss on labels, such as loss=cross_entropy."
        )
    return prediction.outputs


class FeatureReconstruction(Loss):
    """Squared error of the features that slots reconstruct (DINOSAUR: Seitzer et al., arXiv 2209.14860).

    On clips, whose slots go from frame to frame, as in SAVi (Kipf et al., arXiv 2111.12594). The mean over all
    elements of a frame's features, over frames and over the offsets `steps` of the head, each offset counting the same.
    The features are targets only: no gradient reaches the backbone through them.
    """

    needs_slots = True
    divisor = "clips"  # all have the same length, so that means over frames are divided by the number of clips

    def __init__(self) -> None:  # that of nn.Module takes any key
        super().__init__()

    def forward(self, prediction: Prediction, batch: Batch | ClipBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss; `weight`, the number of frames that tell, over all clips; and `step_<offset>`.

        Raises:
            UserError: the head has no slots.
        """
        outputs = slot_outputs(prediction)
        errors: dict[str, Tensor] = {}
        for step, told in zip(outputs.steps, outputs.reconstructions, strict=True):
            seen = outputs.features[:, step : step + told.shape[1]].detach()  # (B, T', C, h, w)
            assert seen.shape == told.shape  # else one would be spread over the other
            errors[f"step_{step}"] = F.mse_loss(at_least_float32(told), at_least_float32(seen))
        value = torch.stack(list(errors.values())).mean()
        clips, frames = outputs.slots.shape[:2]
        parts = {name: error.detach() for name, error in errors.items()}
        return value, {"weight": value.new_full((), clips * frames), **parts}
