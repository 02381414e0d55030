"""A convolutional decoder that enlarges the patch grid to pixels, block by block."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinoseg.core.contracts import Head
from dinoseg.models.heads.options import check_choice
from dinoseg.models.heads.pyramid import one_grid_width
from dinoseg.utils.errors import UserError
from dinoseg.utils.ranges import Count, LowShare, Natural

ACTIVATIONS = {"relu": nn.ReLU, "leakyrelu": nn.LeakyReLU, "sigmoid": nn.Sigmoid, "tanh": nn.Tanh}


class CnnHead(Head[Tensor]):
    """Residual convolutions between enlargements, after Brondolo and Beaussant (arXiv 2407.18100).

    Each block enlarges the grid by 2, the first by what remains to the patch size (1.75 for 14 pixels and four blocks),
    then adds a convolution of the result to it. The first blocks enlarge bicubically and normalise before the
    convolution; the last ones shuffle channels into pixels, which quarters the channels. Dropout and the activation
    follow every second block, the last one among them.

    Args:
        in_dim: width of the maps.
        num_layers: maps, concatenated.
        num_classes: classes to score.
        patch_size: side of a patch in pixels, the enlargement in all.
        num_blocks: blocks, at most 1 + log2(patch_size).
        channels: of the blocks before any shuffle.
        kernel_size: of every convolution, odd.
        activation: relu, leakyrelu, sigmoid or tanh.
        dropout: share of the activations dropped in training, in [0, 1).
        pixel_shuffle: how many of the last blocks enlarge by pixel shuffle.

    Raises:
        UserError: an option that does not fit, or the maps of a pyramid.
    """

    def __init__(
        self,
        in_dim: int | Sequence[int],
        num_layers: int,
        num_classes: Count,
        patch_size: Count,
        num_blocks: Natural = 4,
        channels: Count = 512,
        kernel_size: Count = 3,
        activation: str = "relu",
        dropout: LowShare = 0.2,
        pixel_shuffle: Count = 2,
    ) -> None:
        super().__init__()
        _check_blocks(patch_size, num_blocks, channels, pixel_shuffle)
        _check_layers(kernel_size, activation, dropout)
        width = one_grid_width("cnn", in_dim, num_layers)
        self.patch_size = patch_size
        self.num_smooth = num_blocks - pixel_shuffle
        self.enter = _conv(width, channels, kernel_size)
        smooth = [_normed_conv(channels, kernel_size) for _ in range(self.num_smooth)]
        shuffled = [channels // 4 ** (number + 1) for number in range(pixel_shuffle)]
        self.blocks = nn.ModuleList([*smooth, *(_conv(width, width, kernel_size) for width in shuffled)])
        self.dropout = nn.Dropout(dropout)
        self.activation = ACTIVATIONS[activation]()
        self.classify = _conv(channels // 4**pixel_shuffle, num_classes, kernel_size)

    def forward(self, features: list[Tensor]) -> Tensor:
        """Return class scores of the padded input (B, K, h * P, w * P)."""
        height, width = features[0].shape[-2:]
        grid = self._enlarge_first(self.enter(torch.cat(features, dim=1)))
        for number, block in enumerate(self.blocks):
            if number >= self.num_smooth:
                grid = F.pixel_shuffle(grid, 2)
            elif number > 0:
                grid = F.interpolate(grid, scale_factor=2, mode="bicubic")
            grid = grid + block(grid)
            if (len(self.blocks) - number) % 2 == 1:
                grid = self.activation(self.dropout(grid))
        # the first block's last row and column may reach beyond the last token
        return self.classify(grid)[..., : height * self.patch_size, : width * self.patch_size]

    def grid_scores(self, outputs: Tensor) -> Tensor:
        """Return the outputs: `predict` is bilinear between them."""
        return outputs

    def _enlarge_first(self, grid: Tensor) -> Tensor:
        """Enlarge to the first block's grid; its last row and column may reach beyond the last token.

        The border token is repeated until the enlarged grid is whole, so that the scale is exact for any grid: rounding
        the size instead would stretch it.
        """
        cells = 2 ** (len(self.blocks) - 1)  # pixels in a cell of the first block's grid
        if cells == self.patch_size:
            return grid
        whole = cells // math.gcd(cells, self.patch_size)  # tokens that make a whole number of cells
        height, width = grid.shape[-2:]
        padded = F.pad(grid, (0, -width % whole, 0, -height % whole), mode="replicate")
        size = [side * self.patch_size // cells for side in padded.shape[-2:]]
        rows, columns = ((side * self.patch_size + cells - 1) // cells for side in (height, width))
        return F.interpolate(padded, size, mode="bicubic")[..., :rows, :columns]


def _conv(in_channels: int, out_channels: int, kernel_size: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2)


def _normed_conv(channels: int, kernel_size: int) -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm2d(channels), _conv(channels, channels, kernel_size))


def _check_blocks(patch_size: int, num_blocks: int, channels: int, pixel_shuffle: int) -> None:
    most = patch_size.bit_length()
    if not 1 <= num_blocks <= most:
        raise UserError(
            f"head.num_blocks={num_blocks}: each block after the first doubles the grid, and all of them enlarge it "
            f"by the patch size, {patch_size}. Give a number from 1 to {most}."
        )
    if not 0 <= pixel_shuffle < num_blocks:
        raise UserError(
            f"head.pixel_shuffle={pixel_shuffle}: the first of head.num_blocks={num_blocks} blocks cannot enlarge by "
            f"pixel shuffle, since its factor is no fixed one. Give a number from 0 to {num_blocks - 1}."
        )
    if channels < 1 or channels % 4**pixel_shuffle:
        raise UserError(
            f"head.channels={channels}: each of head.pixel_shuffle={pixel_shuffle} shuffles makes one channel of four. "
            f"Give a positive multiple of {4**pixel_shuffle}, or fewer shuffles."
        )


def _check_layers(kernel_size: int, activation: str, dropout: float) -> None:
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise UserError(
            f"head.kernel_size={kernel_size}: only an odd kernel has a centre and keeps the grid's size, which the "
            f"residual sum needs. Give an odd number, such as 3."
        )
    check_choice("activation", activation, ACTIVATIONS)
    if not 0 <= dropout < 1:
        raise UserError(f"head.dropout={dropout}: give a share from 0 up to below 1.")
