"""ViT adapter: a pyramid of strides 4, 8, 16 and 32 from the maps of a plain vision transformer and the image."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dinoseg.extensions.query_heads.mask2former.deformable import DeformableAttention
from dinoseg.extensions.query_heads.mask2former.levels import Size, cell_centres, size_of, to_maps, to_tokens
from dinoseg.utils.precision import at_least_float32

TOKEN = 16  # image pixels per token side
STEM = 64  # channels of the first convolutions


class VitAdapter(nn.Module):
    """Convolutional pyramid that attends to four maps of a transformer (after Chen et al., arXiv 2205.08534).

    As in DINOv3's segmentor, nothing is written back into the transformer. Modules are named as in Meta's file.

    Args:
        dim: width of the transformer's maps, and of the pyramid.
        num_heads: heads of the deformable attention; a divisor of half of `dim`.
        drop_path: probability of skipping a feed-forward block per sample in training.
        checkpointing: recompute the extractors' activations in the backward pass.
    """

    def __init__(self, dim: int, num_heads: int, drop_path: float, checkpointing: bool) -> None:
        super().__init__()
        self.level_embed = nn.Parameter(torch.empty(3, dim))
        self.spm = SpatialPrior(dim)
        options = (dim, num_heads, drop_path, checkpointing)
        self.interactions = nn.ModuleList(Interaction(*options, extra=2 * (block == 3)) for block in range(4))
        self.up = nn.ConvTranspose2d(dim, dim, kernel_size=2, stride=2)
        self.norm1, self.norm2, self.norm3, self.norm4 = (nn.BatchNorm2d(dim) for _ in range(4))
        for part in (self.spm, self.interactions, self.up):
            part.apply(_initialise)
        for module in self.interactions.modules():
            if isinstance(module, DeformableAttention):
                module.reset_parameters()
        nn.init.normal_(self.level_embed)

    def forward(self, features: Sequence[Tensor], pixels: Tensor) -> list[Tensor]:
        """Return maps (B, dim, ., .) of 4h x 4w, 2h x 2w, h x w and h/2 x w/2 cells, the last rounded up.

        Args:
            features: four maps (B, dim, h, w), early blocks first.
            pixels: the normalised images of these maps; resized to 16 pixels per token if necessary.
        """
        features = [at_least_float32(feature).contiguous() for feature in features]  # the backbone may be bfloat16
        pixels = at_least_float32(pixels)
        rows, columns = size_of(features[-1])
        # strides of 4 to 32 px are then a quarter of a token to two tokens, at any patch size
        if size_of(pixels) != (TOKEN * rows, TOKEN * columns):
            pixels = F.interpolate(pixels, (TOKEN * rows, TOKEN * columns), mode="bilinear", align_corners=False)
        quarter, *coarser = self.spm(pixels)
        sizes = [size_of(level) for level in coarser]
        tokens = to_tokens(
            [level + shift[:, None, None] for level, shift in zip(coarser, self.level_embed, strict=True)]
        )
        centres = cell_centres(sizes, like=pixels)
        for interact, feature in zip(self.interactions, features, strict=True):
            tokens = interact(tokens, centres, sizes, feature)
        coarser = to_maps(tokens, sizes)
        maps = [quarter + self.up(coarser[0]), *coarser]
        norms = (self.norm1, self.norm2, self.norm3, self.norm4)
        return [
            # each level also adds a map of the transformer itself (`add_vit_feature` of the official code)
            norm(level + F.interpolate(feature, size_of(level), mode="bilinear", align_corners=False))
            for norm, level, feature in zip(norms, maps, features, strict=True)
        ]


class SpatialPrior(nn.Module):
    """Small convolutional network on the pixels; returns maps (B, dim, ., .) of strides 4, 8, 16 and 32."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        stem = (*_conv(3, STEM, 2), *_conv(STEM, STEM, 1), *_conv(STEM, STEM, 1))
        self.stem = nn.Sequential(*stem, nn.MaxPool2d(kernel_size=3, stride=2, padding=1))
        self.conv2 = nn.Sequential(*_conv(STEM, 2 * STEM, 2))
        self.conv3 = nn.Sequential(*_conv(2 * STEM, 4 * STEM, 2))
        self.conv4 = nn.Sequential(*_conv(4 * STEM, 4 * STEM, 2))
        self.fc1, self.fc2, self.fc3, self.fc4 = (nn.Conv2d(times * STEM, dim, 1) for times in (1, 2, 4, 4))

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Return the four maps, finest first."""
        first = self.stem(pixels)
        second = self.conv2(first)
        third = self.conv3(second)
        fourth = self.conv4(third)
        return [self.fc1(first), self.fc2(second), self.fc3(third), self.fc4(fourth)]


class Interaction(nn.Module):
    """One extractor, and `extra` more after it, that read one map of the transformer into the pyramid."""

    def __init__(self, dim: int, num_heads: int, drop_path: float, checkpointing: bool, *, extra: int) -> None:
        super().__init__()
        options = (dim, num_heads, drop_path, checkpointing)
        self.extractor = Extractor(*options)
        self.extra_extractors = nn.ModuleList(Extractor(*options) for _ in range(extra))

    def forward(self, tokens: Tensor, centres: Tensor, sizes: Sequence[Size], feature: Tensor) -> Tensor:
        """Return the updated pyramid tokens (B, N, dim)."""
        for extract in (self.extractor, *self.extra_extractors):
            tokens = extract(tokens, centres, sizes, feature)
        return tokens


class Extractor(nn.Module):
    """Deformable attention from the pyramid's tokens to one map, then a feed-forward block with a 3x3 convolution."""

    def __init__(self, dim: int, num_heads: int, drop_path: float, checkpointing: bool) -> None:
        super().__init__()
        self.drop_path = drop_path
        self.checkpointing = checkpointing
        self.query_norm = nn.LayerNorm(dim, eps=1e-6)
        self.feat_norm = nn.LayerNorm(dim, eps=1e-6)
        # values of half the width (`deform_ratio` of the official code) halve the memory of the samples
        self.attn = DeformableAttention(dim, num_heads, num_levels=1, ratio=0.5)
        self.ffn = ConvFeedForward(dim, dim // 4)
        self.ffn_norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, tokens: Tensor, centres: Tensor, sizes: Sequence[Size], feature: Tensor) -> Tensor:
        """Return the updated pyramid tokens (B, N, dim)."""
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(self._extract, tokens, centres, sizes, feature, use_reentrant=False)
        return self._extract(tokens, centres, sizes, feature)

    def _extract(self, tokens: Tensor, centres: Tensor, sizes: Sequence[Size], feature: Tensor) -> Tensor:
        cells = self.feat_norm(to_tokens([feature]))
        tokens = tokens + self.attn(self.query_norm(tokens), centres, cells, [size_of(feature)])
        update = self.ffn(self.ffn_norm(tokens), sizes)
        return tokens + drop_samples(update, self.drop_path if self.training else 0.0)


class ConvFeedForward(nn.Module):
    """Two linear layers with a depthwise 3x3 convolution on each pyramid level between them."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = nn.ModuleDict({"dwconv": nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)})
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, tokens: Tensor, sizes: Sequence[Size]) -> Tensor:
        """Return the update of tokens (B, N, dim)."""
        mix = self.dwconv["dwconv"]
        levels = [mix(level) for level in to_maps(self.fc1(tokens), sizes)]
        return self.fc2(F.gelu(to_tokens(levels)))


def drop_samples(update: Tensor, share: float) -> Tensor:
    """Set a random share of samples (B, ...) to zero and rescale the others (Huang et al., arXiv 1603.09382)."""
    if share == 0:
        return update
    survives = torch.rand(update.shape[0], *[1] * (update.ndim - 1), device=update.device) >= share
    # divided by the share that remains, so that the mean is that of evaluation
    return update * survives / (1 - share)


def _conv(in_dim: int, out_dim: int, stride: int) -> tuple[nn.Module, ...]:
    conv = nn.Conv2d(in_dim, out_dim, kernel_size=3, stride=stride, padding=1, bias=False)
    return conv, nn.BatchNorm2d(out_dim), nn.ReLU(inplace=True)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        # He et al. (arXiv 1502.01852) by outgoing connections, as in the official code
        outgoing = math.prod(module.kernel_size) * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / outgoing))
    if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d) and module.bias is not None:
        nn.init.zeros_(module.bias)
