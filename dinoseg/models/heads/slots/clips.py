"""Source frames of a clip, and assembly of their outputs."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dinoseg.core.shapes import SlotOutputs
from dinoseg.models.heads.slots.decoder import Decoded
from dinoseg.utils.errors import UserError


class FrameSlots(NamedTuple):
    """Slots, attention and reconstructions of one frame."""

    slots: Tensor  # (B, S, D)
    attention: Tensor  # (B, S, h, w)
    reconstructions: list[Decoded]  # reconstructions, one for each offset in `steps`


def telling_frames(frames: int, steps: Sequence[int], *, training: bool, learns_onwards: bool) -> int:
    """Return the number of source frames, whose slots reconstruct frames.

    The last max(steps) frames are only targets.

    Args:
        frames: number of frames in the clip.
        steps: offsets in frames of the reconstruction targets.
        training: False allows an image, a clip of one frame, as its own source whatever the steps.
        learns_onwards: whether the predictor is trained from one source frame to the next, and so needs two.

    Raises:
        UserError: the clip is too short.
    """
    telling = frames - max(steps)
    if telling == 1 and training and learns_onwards:
        raise UserError(
            f"head.predictor=savi learns from pairs of frames, but clips of {frames} frames have none "
            f"(head.steps={steps}). Set data.clips.cut.length={max(steps) + 2} or more; or, for single frames, "
            "head.predictor=none."
        )
    if telling >= 1:
        return telling
    if frames == 1 and not training:
        return 1
    raise UserError(
        f"head.steps={steps} reconstructs up to {max(steps)} frames ahead, but clips have {frames}. Set "
        f"data.clips.cut.length={max(steps) + 1} or more, or lower head.steps."
    )


def clip_outputs(features: Tensor, frames: Sequence[FrameSlots], steps: list[int], mask_step: int) -> SlotOutputs:
    """Return the outputs of the source frames, stacked over time.

    Args:
        features: (B, T, C, h, w).
        frames: source frames, in order.
        steps: offsets in frames of their reconstructions.
        mask_step: index into `steps` of the reconstruction used for masks and similarity.
    """
    reconstructions = list(zip(*(frame.reconstructions for frame in frames), strict=True))  # by step, then by frame
    similarity = [decoded.similarity for decoded in reconstructions[mask_step] if decoded.similarity is not None]
    return SlotOutputs(
        features=features,
        reconstructions=[torch.stack([decoded.features for decoded in of_step], dim=1) for of_step in reconstructions],
        alphas=[torch.stack([decoded.alpha for decoded in of_step], dim=1) for of_step in reconstructions],
        attention=torch.stack([frame.attention for frame in frames], dim=1),
        slots=torch.stack([frame.slots for frame in frames], dim=1),
        steps=steps,
        similarity=torch.stack(similarity, dim=1) if similarity else None,
    )


def check_similar_cells(grid: tuple[int, int], trained_grid: tuple[int, int]) -> None:
    """Refuse a grid other than the one the similarity is predicted over."""
    if grid != trained_grid:
        raise UserError(
            f"head.similarity=true predicts {trained_grid[0]} x {trained_grid[1]} cells (head.positions_grid), but "
            f"these frames have {grid[0]} x {grid[1]}. Set resolution.crop to head.positions_grid times the backbone's "
            f"patch size, or head.positions_grid=[{grid[0]},{grid[1]}] and train again."
        )
