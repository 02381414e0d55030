"""Feature reconstruction loss for slot heads."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dinoseg.core.contracts import Loss
from dinoseg.core.shapes import Prediction, StackedSamples
from dinoseg.extensions.slots.contract import SlotOutputs
from dinoseg.utils.errors import UserError
from dinoseg.utils.precision import at_least_float32

ADVICE = "Choose trainer=slots with head=slots, or a loss on labels, such as loss=cross_entropy."


def slot_outputs(prediction: Prediction) -> SlotOutputs:
    """Return the outputs of a slot head.

    Raises:
        UserError: the outputs are those of another head.
    """
    if not isinstance(prediction.outputs, SlotOutputs):
        raise UserError(
            "feature_reconstruction, temporal_similarity and slot_contrast train slots and need the outputs of a slot "
            "head. For other heads choose a loss on labels, such as cross_entropy."
        )
    return prediction.outputs


class FeatureReconstruction(Loss):
    """Squared error of the features that slots reconstruct (DINOSAUR: Seitzer et al., arXiv 2209.14860).

    On clips, slots are carried from frame to frame, as in SAVi (Kipf et al., arXiv 2111.12594). The error is averaged
    over all elements of a frame's features, over frames, and over the head's offsets `steps` with equal weight. The
    features are targets only: no gradient reaches the backbone through them.
    """

    needs = frozenset({"slots", "reconstruction"})
    advice = ADVICE
    divisor = "clips"  # equal clip lengths: a mean over frames is a mean over clips

    def __init__(self) -> None:  # nn.Module's would accept any keyword
        super().__init__()

    def forward(self, prediction: Prediction, batch: StackedSamples) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss; `weight`, the number of source frames over all clips; and `step_<offset>`.

        Raises:
            UserError: the head has no slots, or reconstructs nothing.
        """
        outputs = slot_outputs(prediction)
        if not outputs.reconstructions[0].shape[2]:
            raise UserError(
                "The head reconstructs no features, which this loss compares. Give the head reconstruct=true, or "
                "choose temporal_similarity."
            )
        errors: dict[str, Tensor] = {}
        for step, reconstructed in zip(outputs.steps, outputs.reconstructions, strict=True):
            # source frame t reconstructs frame t + step
            target = outputs.features[:, step : step + reconstructed.shape[1]].detach()  # (B, T', C, h, w)
            assert target.shape == reconstructed.shape  # mse_loss would broadcast
            errors[f"step_{step}"] = F.mse_loss(at_least_float32(reconstructed), at_least_float32(target))
        # each offset counts alike, as in DINOSAVi
        value = torch.stack(list(errors.values())).mean()
        clips, frames = outputs.slots.shape[:2]
        parts = {name: error.detach() for name, error in errors.items()}
        return value, {"weight": value.new_full((), clips * frames), **parts}
