"""DINOv2's linear probe."""

import torch
from torch import Tensor, nn

from dinoseg.geometry import upsample


class LinearHead(nn.Module):
    """BatchNorm and one 1x1 convolution over the concatenated feature maps (Oquab et al., arXiv 2304.07193)."""

    def __init__(self, in_dim: int, num_layers: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(in_dim * num_layers)
        self.classify = nn.Conv2d(in_dim * num_layers, num_classes, kernel_size=1)

    def forward(self, features: list[Tensor]) -> Tensor:
        """Return class scores on the patch grid (B, K, h, w)."""
        return self.classify(self.norm(torch.cat(features, dim=1)))

    def predict(self, outputs: Tensor, size: tuple[int, int], valid: tuple[float, float]) -> Tensor:
        """Return class scores (B, K, H, W), bilinear between patch centres."""
        return upsample(outputs, size, valid)
