"""Decoder of the dense prediction transformer (DPT)."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from dinoseg.core.contracts import Head
from dinoseg.core.geometry import widths
from dinoseg.models.heads.pyramid import NUM_LEVELS, Reassemble, refuse_unless_four
from dinoseg.utils.errors import UserError
from dinoseg.utils.ranges import Count, LowShare, check_annotations

WIDEST = 1024  # maximum default width of a level: that of the published large model


class DptHead(Head[Tensor]):
    """Four maps reassembled into a pyramid and fused from coarse to fine (Ranftl et al., arXiv 2103.13413).

    Earlier blocks enter at finer grids, so thin structures survive the patch grid. The class token is not used.
    Unlike the original, each fusion resizes to the exact grid of the next level with aligned pixel centres, so
    nothing shifts on odd grids. The classes are scored on the grid of the finest level, without a final doubling.

    Args:
        in_dim: the width of a transformer's maps, or the list of a pyramid's widths.
        num_layers: number of maps, four.
        num_classes: number of classes K.
        features: channels of the decoder.
        out_channels: channels of the four levels before the decoder, finest first. Default: an eighth, a quarter,
            half and all of the width of a transformer's maps, or a pyramid's own widths, at most 1024 each.
        batch_norm: use BatchNorm in the decoder, as the original does for segmentation.
        dropout: dropout probability before the classifier, in [0, 1).

    Raises:
        UserError: the number of maps is not four, or an option is invalid.
    """

    @check_annotations
    def __init__(
        self,
        in_dim: int | Sequence[int],
        num_layers: int,
        num_classes: Count,
        features: Count = 256,
        out_channels: Sequence[Count] | None = None,
        batch_norm: bool = True,
        dropout: LowShare = 0.1,
    ) -> None:
        super().__init__()
        refuse_unless_four("dpt", num_layers)
        channels = _default_channels(in_dim) if out_channels is None else list(out_channels)
        if len(channels) != NUM_LEVELS:
            raise UserError(f"out_channels={channels}: give four numbers, the channels from the finest level on.")
        self.reassemble = Reassemble(in_dim, channels)
        self.adapt = nn.ModuleList(nn.Conv2d(width, features, 3, padding=1, bias=False) for width in channels)
        self.fuse = nn.ModuleList(
            _Fusion(features, batch_norm, coarsest=level == NUM_LEVELS - 1) for level in range(NUM_LEVELS)
        )
        self.classify = nn.Sequential(
            *_conv(features, batch_norm),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Conv2d(features, num_classes, kernel_size=1),
        )

    def forward(self, features: list[Tensor]) -> Tensor:
        """Return class scores (B, K, 4h, 4w) for a transformer, or on the finest grid of a pyramid."""
        levels = [adapt(part) for adapt, part in zip(self.adapt, self.reassemble(features), strict=True)]
        path = None
        for level, fuse in reversed(list(zip(levels, self.fuse, strict=True))):
            path = fuse(level, path)
        return self.classify(path)

    def grid_scores(self, outputs: Tensor) -> Tensor:
        """Return the outputs, since `predict` only upsamples them bilinearly."""
        return outputs


class _Fusion(nn.Module):
    """Add a level to the output of the coarser ones, and refine the sum."""

    def __init__(self, features: int, batch_norm: bool, *, coarsest: bool) -> None:
        super().__init__()
        self.enter = None if coarsest else _ResidualUnit(features, batch_norm)
        self.refine = _ResidualUnit(features, batch_norm)
        self.leave = nn.Conv2d(features, features, kernel_size=1)

    def forward(self, level: Tensor, coarser: Tensor | None) -> Tensor:
        if self.enter is not None and coarser is not None:
            level = self.enter(level) + F.interpolate(coarser, level.shape[-2:], mode="bilinear")
        return self.leave(self.refine(level))


class _ResidualUnit(nn.Module):
    """Two 3x3 convolutions, each after a ReLU, added to their input."""

    def __init__(self, features: int, batch_norm: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.ReLU(), *_conv(features, batch_norm), nn.ReLU(), *_conv(features, batch_norm))

    def forward(self, level: Tensor) -> Tensor:
        return level + self.body(level)


def _conv(features: int, batch_norm: bool) -> list[nn.Module]:
    conv = nn.Conv2d(features, features, kernel_size=3, padding=1, bias=not batch_norm)
    return [conv, nn.BatchNorm2d(features)] if batch_norm else [conv]


def _default_channels(in_dim: int | Sequence[int]) -> list[int]:
    shares = (8, 4, 2, 1) if isinstance(in_dim, int) else (1, 1, 1, 1)
    widths_and_shares = zip(widths(in_dim, NUM_LEVELS), shares, strict=True)
    return [max(1, min(width, WIDEST) // share) for width, share in widths_and_shares]
