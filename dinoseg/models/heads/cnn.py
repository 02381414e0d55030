"""Convolutional decoder that upsamples the patch grid to pixels, block by block."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinoseg.core.contracts import Head
from dinoseg.models.heads.pyramid import one_grid_width
from dinoseg.utils.errors import UserError
from dinoseg.utils.ranges import Count, LowShare, Natural, check_annotations

ACTIVATIONS = {"relu": nn.ReLU, "leakyrelu": nn.LeakyReLU, "sigmoid": nn.Sigmoid, "tanh": nn.Tanh}


class CnnHead(Head[Tensor]):
    """Residual convolutions between upsampling steps, after Brondolo and Beaussant (arXiv 2407.18100).

    Each block upsamples the grid by 2, the first by the remaining factor (1.75 for a patch size of 14 and four
    blocks). It then adds a convolution of the grid to the grid. The first blocks upsample bicubically and apply
    BatchNorm before the convolution; the last ones use pixel shuffle, which divides the channels by 4. Dropout and
    the activation follow every second block, including the last one.

    Args:
        in_dim: width of the maps.
        num_layers: number of maps, concatenated.
        num_classes: number of classes K.
        patch_size: side of a patch in pixels, the total upsampling factor.
        num_blocks: number of blocks, at most 1 + log2(patch_size).
        channels: width of the blocks before any pixel shuffle.
        kernel_size: of every convolution, odd.
        activation: relu, leakyrelu, sigmoid or tanh.
        dropout: dropout probability, in [0, 1).
        pixel_shuffle: number of last blocks that upsample by pixel shuffle.

    Raises:
        UserError: an option is invalid, or the maps belong to a pyramid.
    """

    @check_annotations
    def __init__(
        self,
        in_dim: int | Sequence[int],
        num_layers: int,
        num_classes: Count,
        patch_size: Count,
        num_blocks: Count = 4,
        channels: Count = 512,
        kernel_size: Count = 3,
        activation: Literal["relu", "leakyrelu", "sigmoid", "tanh"] = "relu",
        dropout: LowShare = 0.2,
        pixel_shuffle: Natural = 2,
    ) -> None:
        super().__init__()
        most = patch_size.bit_length()
        if num_blocks > most:
            raise UserError(
                f"num_blocks={num_blocks}: each block after the first doubles the resolution, up to the patch size, "
                f"{patch_size}. Give a number from 1 to {most}."
            )
        if pixel_shuffle >= num_blocks:
            raise UserError(
                f"pixel_shuffle={pixel_shuffle}: the first of num_blocks={num_blocks} blocks cannot upsample by "
                f"pixel shuffle, since its factor is not fixed. Give a number from 0 to {num_blocks - 1}."
            )
        if channels % 4**pixel_shuffle:
            raise UserError(
                f"channels={channels}: each of pixel_shuffle={pixel_shuffle} shuffles divides the channels by four. "
                f"Give a multiple of {4**pixel_shuffle}, or fewer shuffles."
            )
        if kernel_size % 2 == 0:
            raise UserError(
                f"kernel_size={kernel_size}: only an odd kernel preserves the grid size, which the residual "
                "connection needs. Give an odd number, such as 3."
            )
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
        # the last row and column of the first block's grid may extend beyond the last token
        return self.classify(grid)[..., : height * self.patch_size, : width * self.patch_size]

    def grid_scores(self, outputs: Tensor) -> Tensor:
        """Return the outputs, since `predict` only upsamples them bilinearly."""
        return outputs

    def _enlarge_first(self, grid: Tensor) -> Tensor:
        """Resize to the first block's grid, whose last row and column may extend beyond the last token.

        Border tokens are replicated until the grid has a whole number of cells, so the scale is exact for any grid.
        Rounding the size instead would stretch the grid.
        """
        cells = 2 ** (len(self.blocks) - 1)  # side in pixels of a cell of the first block's grid
        if cells == self.patch_size:
            return grid
        whole = cells // math.gcd(cells, self.patch_size)  # tokens per whole number of cells
        height, width = grid.shape[-2:]
        padded = F.pad(grid, (0, -width % whole, 0, -height % whole), mode="replicate")
        size = [side * self.patch_size // cells for side in padded.shape[-2:]]
        rows, columns = ((side * self.patch_size + cells - 1) // cells for side in (height, width))
        return F.interpolate(padded, size, mode="bicubic")[..., :rows, :columns]


def _conv(in_channels: int, out_channels: int, kernel_size: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2)


def _normed_conv(channels: int, kernel_size: int) -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm2d(channels), _conv(channels, channels, kernel_size))
