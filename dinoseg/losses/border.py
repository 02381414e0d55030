"""Pixels near a border between classes, which can count more or less than others."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dinoseg.utils.errors import UserError
from dinoseg.utils.ranges import Count, NotNegative


@dataclass(frozen=True)
class Border:
    """What pixels near a border count, beside the 1 of all others.

    A pixel is near one if the square of 2 `width` + 1 pixels around it has labels of two classes or more: unlabelled
    pixels are of no class, so that their rim is no border, and a border that is drawn unlabelled still is one.

    Args:
        weight: of the pixels near one; 1: all count alike.
        width: pixels to each side.
    """

    weight: NotNegative = 1.0
    width: Count = 3

    def __post_init__(self) -> None:
        """Refuse what is no weight or width."""
        if not 0 <= self.weight < float("inf"):
            raise UserError(
                f"loss.criterion.border_weight={self.weight}: give a number of at least 0; 1 counts all pixels alike."
            )
        if self.width < 1:
            raise UserError(f"loss.criterion.border_width={self.width}: give a number of pixels of at least 1.")

    def weights(self, mask: Tensor, ignore_index: int) -> Tensor | None:
        """Return the weights (B, H, W) float32 of masks' pixels; None: all count alike."""
        if self.weight == 1:
            return None
        near = near_borders(mask, ignore_index, self.width)
        return torch.where(near, self.weight, 1.0)


def near_borders(mask: Tensor, ignore_index: int, width: int) -> Tensor:
    """Return which pixels (B, H, W) bool of masks have labels of two classes within `width` pixels, along both axes."""
    ids, ignored = mask.float(), mask == ignore_index
    highest = _pooled(ids.masked_fill(ignored, -torch.inf), width)
    lowest = -_pooled((-ids).masked_fill(ignored, -torch.inf), width)
    return highest > lowest  # where nothing is labelled, minus infinity is not above infinity


def _pooled(values: Tensor, width: int) -> Tensor:
    """Return the highest value of the square around each of (B, H, W)."""
    down = F.max_pool2d(values[:, None], (2 * width + 1, 1), stride=1, padding=(width, 0))
    return F.max_pool2d(down, (1, 2 * width + 1), stride=1, padding=(0, width))[:, 0]
