"""DINOv2's linear probe."""

from collections.abc import Sequence

from torch import Tensor, nn

from dinoseg.contracts import Head
from dinoseg.errors import UserError
from dinoseg.geometry import concatenate, widths
from dinoseg.ranges import Count


class LinearHead(Head[Tensor]):
    """BatchNorm and one 1x1 convolution over the concatenated feature maps (Oquab et al., arXiv 2304.07193).

    Args:
        in_dim: the width of a transformer's maps, or the list of a pyramid's widths.
        num_layers: maps, concatenated.
        num_classes: classes to score.
        least_maps: refuse fewer.

    Raises:
        UserError: fewer maps than that.
    """

    def __init__(self, in_dim: int | Sequence[int], num_layers: int, num_classes: Count, least_maps: Count = 1) -> None:
        super().__init__()
        if num_layers < least_maps:
            raise UserError(
                f"This head reads at least {least_maps} feature maps (head.least_maps), but backbone.layers gives "
                f"{num_layers}. Name more blocks, such as backbone.layers=[-4,-3,-2,-1], or choose a head that takes "
                f"one map: linear, mlp or cnn."
            )
        width = sum(widths(in_dim, num_layers))
        self.norm = nn.BatchNorm2d(width)
        self.classify = nn.Conv2d(width, num_classes, kernel_size=1)

    def forward(self, features: list[Tensor]) -> Tensor:
        """Return class scores on the patch grid (B, K, h, w)."""
        return self.classify(self.norm(concatenate(features)))

    def grid_scores(self, outputs: Tensor) -> Tensor:
        """Return the outputs: `predict` is bilinear between them."""
        return outputs
