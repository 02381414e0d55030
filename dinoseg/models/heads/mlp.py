"""Per-patch MLP that predicts a block of pixels for each token."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinoseg.core.contracts import Head
from dinoseg.models.heads.pyramid import one_grid_width
from dinoseg.utils.ranges import Count


class MlpHead(Head[Tensor]):
    """Three linear layers per token, each K * P * P wide; the last outputs a P x P block of class scores.

    Patches are not mixed: all context comes from the backbone.

    Raises:
        UserError: the maps belong to a pyramid.
    """

    def __init__(self, in_dim: int | Sequence[int], num_layers: int, num_classes: Count, patch_size: Count) -> None:
        super().__init__()
        width = num_classes * patch_size**2
        self.patch_size = patch_size
        self.layers = nn.Sequential(
            nn.Linear(one_grid_width("mlp", in_dim, num_layers), width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, width),
        )

    def forward(self, features: list[Tensor]) -> Tensor:
        """Return class scores of the padded input (B, K, h * P, w * P)."""
        tokens = torch.cat(features, dim=1).permute(0, 2, 3, 1)  # (B, h, w, C * L)
        blocks = self.layers(tokens).permute(0, 3, 1, 2)  # (B, K * P * P, h, w)
        return F.pixel_shuffle(blocks, self.patch_size)

    def grid_scores(self, outputs: Tensor) -> Tensor:
        """Return the outputs, since `predict` only upsamples them bilinearly."""
        return outputs
