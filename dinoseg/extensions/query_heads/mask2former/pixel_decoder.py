"""Pixel decoder: deformable attention among three levels, then one step up to stride 4."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dinoseg.extensions.query_heads.mask2former.deformable import DeformableAttention
from dinoseg.extensions.query_heads.mask2former.levels import (
    Size,
    cell_centres,
    sine_positions,
    size_of,
    to_maps,
    to_tokens,
)
from dinoseg.utils.precision import at_least_float32

GROUPS = 32  # of GroupNorm
LAYERS = 6  # of the encoder
LEVELS = 3


class PixelDecoder(nn.Module):
    """Mask2Former's pixel decoder (Cheng et al., arXiv 2112.01527), always in float32.

    Modules are named as in Meta's file.

    Args:
        in_dim: width of the pyramid's maps.
        dim: output width; a multiple of `num_heads` and of 32.
        num_heads: heads of the deformable attention.
        feedforward_dim: hidden width of the feed-forward blocks.
        checkpointing: recompute the encoder's activations in the backward pass.
    """

    def __init__(self, in_dim: int, dim: int, num_heads: int, feedforward_dim: int, checkpointing: bool) -> None:
        super().__init__()
        self.input_convs = nn.ModuleList(
            nn.Sequential(nn.Conv2d(in_dim, dim, kernel_size=1), nn.GroupNorm(GROUPS, dim)) for _ in range(LEVELS)
        )
        self.encoder = LevelEncoder(dim, num_heads, feedforward_dim, checkpointing)
        self.mask_feature = nn.Conv2d(dim, dim, kernel_size=1)
        self.lateral_convs = nn.ModuleList([_normed_conv(in_dim, dim, kernel_size=1)])
        self.output_convs = nn.ModuleList([_normed_conv(dim, dim, kernel_size=3)])
        self._initialise()

    def forward(self, pyramid: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        """Return maps (B, dim, ., .) of strides 32, 16 and 8, and the mask features of stride 4.

        Args:
            pyramid: maps (B, in_dim, ., .) of strides 4, 8, 16 and 32.
        """
        # without autocast, as `forward_features` of the official code
        with torch.autocast(pyramid[0].device.type, enabled=False):
            finest, *coarser = (at_least_float32(level) for level in pyramid)
            # coarsest first, as the convolutions are numbered in Meta's file
            levels = [conv(level) for conv, level in zip(self.input_convs, reversed(coarser), strict=True)]
            levels = self.encoder(levels)
            lateral, output = self.lateral_convs[0], self.output_convs[0]
            above = F.interpolate(levels[-1], size_of(finest), mode="bilinear", align_corners=False)
            mixed = _apply_normed(lateral, finest) + above
            return levels, self.mask_feature(_apply_normed(output, mixed).relu())

    def _initialise(self) -> None:
        for conv in self.input_convs:
            nn.init.xavier_uniform_(conv.get_parameter("0.weight"))
            nn.init.zeros_(conv.get_parameter("0.bias"))
        for conv in (self.mask_feature, *self.lateral_convs, *self.output_convs):
            # `c2_xavier_fill` of the official code
            nn.init.kaiming_uniform_(conv.get_parameter("weight"), a=1)
        nn.init.zeros_(self.mask_feature.get_parameter("bias"))


class LevelEncoder(nn.Module):
    """Stack of deformable attention layers in which the cells of all levels attend to all levels."""

    def __init__(self, dim: int, num_heads: int, feedforward_dim: int, checkpointing: bool) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        layers = nn.ModuleList(EncoderLayer(dim, num_heads, feedforward_dim) for _ in range(LAYERS))
        self.encoder = nn.ModuleDict({"layers": layers})
        self.level_encoding = nn.Parameter(torch.empty(LEVELS, dim))
        nn.init.normal_(self.level_encoding)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Return updated maps (B, dim, ., .) of the same sizes."""
        sizes = [size_of(level) for level in maps]
        tokens = to_tokens(maps)  # (B, N, dim)
        centres = cell_centres(sizes, like=tokens)
        # cells of several levels at one place have one sine code: a learned vector per level distinguishes them
        positions = torch.cat(
            [
                sine_positions(size, tokens.shape[-1], like=tokens) + shift
                for size, shift in zip(sizes, self.level_encoding, strict=True)
            ]
        )
        for layer in self.encoder["layers"].children():
            if self.checkpointing and torch.is_grad_enabled():
                # stores the input of a layer, not its samples: num_heads x 3 levels x 4 points of each cell
                tokens = checkpoint(layer, tokens, positions, centres, sizes, use_reentrant=False)
            else:
                tokens = layer(tokens, positions, centres, sizes)
        return to_maps(tokens, sizes)


class EncoderLayer(nn.Module):
    """Deformable attention and a feed-forward block, each followed by its LayerNorm."""

    def __init__(self, dim: int, num_heads: int, feedforward_dim: int) -> None:
        super().__init__()
        self.self_attn = DeformableAttention(dim, num_heads, LEVELS)
        self.norm1 = nn.LayerNorm(dim)
        self.linear1 = nn.Linear(dim, feedforward_dim)
        self.linear2 = nn.Linear(feedforward_dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        for layer in (self.linear1, self.linear2):
            nn.init.xavier_uniform_(layer.weight)

    def forward(self, tokens: Tensor, positions: Tensor, centres: Tensor, sizes: Sequence[Size]) -> Tensor:
        """Return the updated tokens (B, N, dim); positions are (N, dim), centres (N, 2)."""
        tokens = self.norm1(tokens + self.self_attn(tokens + positions, centres, tokens, sizes))
        return self.norm2(tokens + self.linear2(self.linear1(tokens).relu()))


def _normed_conv(in_dim: int, dim: int, kernel_size: int) -> nn.Conv2d:
    conv = nn.Conv2d(in_dim, dim, kernel_size, padding=kernel_size // 2, bias=False)
    conv.add_module("norm", nn.GroupNorm(GROUPS, dim))  # a child of the convolution, as in Meta's names
    return conv


def _apply_normed(conv: nn.Module, values: Tensor) -> Tensor:
    return conv.get_submodule("norm")(conv(values))
