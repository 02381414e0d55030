"""DINOv2's linear probe over several blocks."""

from collections.abc import Sequence

from dinoseg.errors import UserError
from dinoseg.heads.linear import LinearHead
from dinoseg.ranges import Count


def multiscale_head(in_dim: int | Sequence[int], num_layers: int, num_classes: Count) -> LinearHead:
    """Return a linear head over at least two feature maps: DINOv2's "+ms" probe reads the last four blocks.

    The same BatchNorm and 1x1 convolution as `LinearHead`, over the concatenation (Oquab et al., arXiv 2304.07193).
    """
    if num_layers < 2:
        raise UserError(
            f"head=multiscale reads at least two feature maps, but backbone.layers gives {num_layers}. Name more "
            f"blocks, such as backbone.layers=[-4,-3,-2,-1], or choose a head that takes one map: linear, mlp or cnn."
        )
    return LinearHead(in_dim, num_layers, num_classes)
