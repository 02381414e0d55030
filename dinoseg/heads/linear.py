"""DINOv2's linear probe."""

from collections.abc import Sequence

from torch import Tensor, nn

from dinoseg.contracts import Head
from dinoseg.geometry import concatenate, upsample, widths
from dinoseg.ranges import Count


class LinearHead(Head[Tensor]):
    """BatchNorm and one 1x1 convolution over the concatenated feature maps (Oquab et al., arXiv 2304.07193)."""

    def __init__(self, in_dim: int | Sequence[int], num_layers: int, num_classes: Count) -> None:
        super().__init__()
        width = sum(widths(in_dim, num_layers))
        self.norm = nn.BatchNorm2d(width)
        self.classify = nn.Conv2d(width, num_classes, kernel_size=1)

    def forward(self, features: list[Tensor]) -> Tensor:
        """Return class scores on the patch grid (B, K, h, w)."""
        return self.classify(self.norm(concatenate(features)))

    def predict(self, outputs: Tensor, size: tuple[int, int], valid: tuple[float, float]) -> Tensor:
        """Return class scores (B, K, H, W), bilinear between patch centres."""
        return upsample(outputs, size, valid)
