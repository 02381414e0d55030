"""Backbone that returns mean colours instead of features."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from dinoseg.core.contracts import Backbone
from dinoseg.models.backbones.layers import Layers, resolve_layers
from dinoseg.models.backbones.normalisation import ColourMean, ColourStd, register_colours, resolve_colours
from dinoseg.utils.ranges import Channels, Count, check_annotations


class RgbBackbone(Backbone):
    """Mean colour of each patch: a baseline for learned features.

    Images (B, C, H, W), float in 0..1, any H and W; returns identical maps (B, C, h, w), h = ceil(H / patch_size).
    Colours are normalised around zero, so that cosine similarity distinguishes them. Images are padded with zeros (the
    mean colour) at the bottom and on the right. Padding shortens the colour vectors of border patches
    but keeps their directions. There are no parameters and no weights file.

    Args:
        patch_size: side of a patch in pixels.
        layers: indices into the single layer, such as `[-1]`.
        mean: mean of each channel of images, in 0..1; ImageNet's by default, as in the other backbones.
        std: standard deviation of the same images.
        channels: number of channels C of the images; three are RGB.

    Raises:
        UserError: patch size below 1, layer out of range, or invalid colour statistics.
    """

    depth = 1

    @check_annotations
    def __init__(
        self,
        patch_size: Count = 8,
        layers: Layers = (-1,),
        mean: Sequence[ColourMean] | None = None,
        std: Sequence[ColourStd] | None = None,
        channels: Channels = 3,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.layers = resolve_layers(layers, self.depth)
        self.num_layers = len(self.layers)
        self.dim = channels
        register_colours(self, *resolve_colours("", mean, std, channels=channels))

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the mean normalised colour of each patch, (B, C, h, w), once for each of `layers`."""
        return [F.avg_pool2d(self.pixels(images), self.patch_size)] * self.num_layers
