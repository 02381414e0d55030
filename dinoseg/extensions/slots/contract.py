"""What slot heads have in common: their outputs, and how their segments are propagated from frame to frame.

Axis letters, besides those of `core/shapes.py`: S slots, D width of a slot.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from dinoseg.core.contracts import Head
from dinoseg.models.model import SegmentationModel
from dinoseg.utils.errors import UserError

# what a slot head may provide: `SlotOutputs`, with reconstructed features, with `similarity`, and with slots that are
# propagated from frame to frame
OUTPUTS = frozenset({"slots", "reconstruction", "similarity", "carried"})


@dataclass
class SlotOutputs:
    """Output of a slot head for clips: S segments per frame, and features of this and later frames predicted from them.

    The lists have an entry for each of `steps`: frame t predicts frame t + step. The last max(steps) frames of a clip
    are only predicted, so T' = T - max(steps) frames make predictions.
    """

    features: Tensor  # (B, T, C, h, w) of the backbone: targets of the reconstruction
    reconstructions: list[Tensor]  # (B, T', C, h, w) of frame t + step
    alphas: list[Tensor]  # (B, T', S, h, w), over the slots they sum to 1
    attention: Tensor  # (B, T', S, h, w), over the slots they sum to 1
    slots: Tensor  # (B, T', S, D)
    steps: list[int]
    similarity: Tensor | None = None  # (B, T', N, h, w) logits: to which of the N cells of the next frame a cell moves
    keys: Tensor | None = None  # (B, T, C, h, w) attention keys that `similarity` compares; None: the features
    carried: bool = True  # whether a frame's slots are propagated from the previous frame


class Slots(Head[SlotOutputs]):
    """Base class of slot heads, whose segments are propagated from frame to frame."""

    no_classes = (
        "slots, which have no classes: trainer=slots loss=feature_reconstruction trains them on clips, and mode=track "
        "tracks them through a video"
    )
    provides = OUTPUTS
    groups: str  # in which frames background slots attend only to the background: off, initial or always
    sizes: list[int]  # slots in each group, all in one without groups
    num_slots: int
    predictor: nn.Module | None  # maps slots to initial slots of the next frame; None: sampled in each frame
    mask_source: str  # where its masks come from: attention, or the decoder's alpha

    def step(
        self,
        features: Tensor,
        slots: Tensor | None = None,
        allowed: Tensor | None = None,
        sizes: Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the slots (B, S, D) of one frame (B, C, h, w), and their attention (B, S, h, w)."""
        raise NotImplementedError

    def masks(self, slots: Tensor, attention: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return the soft masks (B, S, h, w) of one frame."""
        raise NotImplementedError


def slots_of(model: SegmentationModel) -> Slots:
    """Return the slot head of a model.

    Raises:
        UserError: it has another head.
    """
    if not isinstance(model.head, Slots):
        raise UserError("The model has no slots to track. Give resume=RUN of a model with head=slots.")
    return model.head
