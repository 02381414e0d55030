"""Weights of pixels near class borders."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dinoseg.utils.errors import UserError
from dinoseg.utils.ranges import Count, NotNegative


@dataclass(frozen=True)
class Border:
    """Weight of pixels near a border, where all others have weight 1.

    A pixel is near a border if the square of 2 `width` + 1 pixels around it contains labels of two or more classes.
    Unlabelled pixels belong to no class: their rim is not a border, and a border under an unlabelled strip still is.

    Args:
        weight: weight of pixels near a border; 1 weights all pixels equally.
        width: distance to the border in pixels, to each side.
    """

    weight: NotNegative = 1.0
    width: Count = 3

    def __post_init__(self) -> None:
        """Refuse an invalid weight or width."""
        if not 0 <= self.weight < float("inf"):
            raise UserError(
                f"loss.criterion.border_weight={self.weight}: give a number of at least 0; 1 weighs all pixels equally."
            )
        if self.width < 1:
            raise UserError(f"loss.criterion.border_width={self.width}: give a number of pixels of at least 1.")

    def weights(self, mask: Tensor, ignore_index: int) -> Tensor | None:
        """Return the pixel weights (B, H, W) float32 of masks, or None if all are 1."""
        if self.weight == 1:
            return None
        near = near_borders(mask, ignore_index, self.width)
        return torch.where(near, self.weight, 1.0)


def near_borders(mask: Tensor, ignore_index: int, width: int) -> Tensor:
    """Return the pixels (B, H, W) bool of masks with labels of two classes within `width` pixels along both axes."""
    ids, ignored = mask.float(), mask == ignore_index
    highest = _pooled(ids.masked_fill(ignored, -torch.inf), width)
    lowest = -_pooled((-ids).masked_fill(ignored, -torch.inf), width)
    return highest > lowest  # without labels: -inf > inf is False


def _pooled(values: Tensor, width: int) -> Tensor:
    """Return the maximum over the square around each pixel (B, H, W)."""
    down = F.max_pool2d(values[:, None], (2 * width + 1, 1), stride=1, padding=(width, 0))
    return F.max_pool2d(down, (1, 2 * width + 1), stride=1, padding=(0, width))[:, 0]
