"""Head that reads pixels as well as tokens, for structures thinner than a patch."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinoseg.core.contracts import Backbone, Head
from dinoseg.core.geometry import concatenate, pad_to_multiple, to_unit_range, widths
from dinoseg.utils.errors import UserError
from dinoseg.utils.ranges import Count, Natural, NotNegative, check_annotations

STRIDE = 4  # output stride in pixels of the grid that fuses tokens and details
_FINEST = 2  # output stride in pixels of the finest details and of the scores
_REACH = 11  # length of a strip convolution in cells: 44 px


class DetailHead(Head[Tensor]):
    """Tokens fused with convolutional pixel features at output stride 4; features at stride 2 refine the scores.

    Squares of 2 x 2 pixels enter the first convolutions as channels, 12 for RGB. The fused grid is scored, smoothed and
    upsampled, and a 3x3 convolution of the features at stride 2 is added. Thin structures are thus not averaged away,
    and most of the work is done on the coarser grid. Strip convolutions along rows and columns capture long, thin
    shapes (after Hou et al., arXiv 2003.13328). ViTMatte (Yao et al., arXiv 2305.15272) and Dino U-Net (arXiv
    2508.20909) also combine a transformer with a convolutional branch.

    With `linear_skip`, the scores of a linear layer on the tokens are added: it separates the classes within a few
    steps, and the convolutions learn the residual.

    Args:
        in_dim: the width of a transformer's maps, or the list of a pyramid's widths.
        num_layers: number of maps; those of a pyramid are resized to its finest grid.
        num_classes: number of classes K.
        patch_size: side of a patch in pixels, even; for a pyramid the stride of the coarsest map.
        fine: channels of the details at output stride 2.
        width: channels of the details, the tokens and their fusion at output stride 4.
        blocks: number of residual strip convolutions after the fusion.
        jitter: standard deviation of the random contrast and colour shift per image, applied to the pixels in
            training.
        linear_skip: add the scores of a linear layer on the tokens.
        channels: number of channels of the images; three are RGB.

    Raises:
        UserError: odd patch size, or a value below its minimum.
    """

    @check_annotations
    def __init__(
        self,
        in_dim: int | Sequence[int],
        num_layers: int,
        num_classes: Count,
        patch_size: Count,
        fine: Count = 16,
        width: Count = 48,
        blocks: Natural = 2,
        jitter: NotNegative = 0.1,
        linear_skip: bool = False,
        channels: Count = 3,
    ) -> None:
        super().__init__()
        if patch_size % _FINEST:
            raise UserError(
                f"patch_size={patch_size} is not a multiple of {_FINEST} px, the output stride of this head. Choose a "
                "backbone with an even patch size, or the head mlp."
            )
        total = sum(widths(in_dim, num_layers))
        self.patch_size, self.jitter = patch_size, jitter
        self.stem = nn.Sequential(
            nn.PixelUnshuffle(_FINEST),
            _convolution(channels * _FINEST**2, fine, 3),
            _convolution(fine, fine, 3),
        )
        self.merge = nn.Sequential(
            _convolution(fine, width, 4, stride=2),  # an even kernel is centred on the 2 x 2 cells it merges
            _Strips(width),
        )
        self.norm = nn.BatchNorm2d(total)
        self.project = nn.Conv2d(total, width, kernel_size=1)
        self.fuse = nn.Sequential(_convolution(2 * width, width, 1), *(_Strips(width) for _ in range(blocks)))
        self.classify = nn.Conv2d(width, num_classes, kernel_size=1)
        self.refine = nn.Conv2d(fine, num_classes, kernel_size=3, padding=1, bias=False)
        self.linear_skip = nn.Conv2d(total, num_classes, kernel_size=1) if linear_skip else None

    def run(self, backbone: Backbone, images: Tensor) -> Tensor:
        """Return class scores of the padded input (B, K, H / 2, W / 2)."""
        return self.compute_scores(backbone.maps(images), backbone.pixels(images))

    def forward_frozen(self, backbone: Backbone, images: Tensor) -> list[Tensor]:
        """Return the backbone's frozen features and the images as uint8 if these are exact, else as uint16."""
        return [*backbone.forward_frozen(images), _as_levels(images)]

    def forward_trainable(self, backbone: Backbone, frozen: list[Tensor], size: tuple[int, int]) -> Tensor:
        """Return the scores for the output of `forward_frozen` on images that entered the backbone at `size` (H, W)."""
        return self.compute_scores(
            backbone.forward_trainable(frozen[:-1], size), backbone.pixels(to_unit_range(frozen[-1]))
        )

    def compute_scores(self, features: list[Tensor], pixels: Tensor) -> Tensor:
        """Return class scores (B, K, H / 2, W / 2).

        Args:
            features: L maps (B, C, h, w).
            pixels: the padded, normalised images (B, C, H, W), H = h * P.
        """
        height, width = pixels.shape[-2:]
        padded = pad_to_multiple(self._jitter_pixels(pixels), STRIDE)
        finest = self.stem(padded.contiguous(memory_format=torch.channels_last))  # a quarter faster on a CPU
        details = self.merge(finest)
        read = self.norm(concatenate(features).contiguous(memory_format=torch.channels_last))
        tokens = self._on_grid(self.project(read), details)
        coarse = self.classify(self.fuse(torch.cat([tokens, details], dim=1)))  # (B, K, ceil(H / 4), ceil(W / 4))
        # four scores per cell by pixel shuffle instead imprinted the 4 px grid on the outlines of masks
        scores = F.interpolate(_smooth(coarse), finest.shape[-2:], mode="bilinear") + self.refine(finest)
        if self.patch_size % STRIDE:  # the last cells may extend beyond the image
            scores = _first(scores, height // _FINEST, width // _FINEST)
        if self.linear_skip is None:
            return scores
        return scores + F.interpolate(self.linear_skip(read), scores.shape[-2:], mode="bilinear")

    def grid_scores(self, outputs: Tensor) -> Tensor:
        """Return the outputs, since `predict` only upsamples them bilinearly."""
        return outputs

    def _jitter_pixels(self, pixels: Tensor) -> Tensor:
        if not (self.training and self.jitter):
            return pixels
        contrast = 1 + self.jitter * torch.randn(len(pixels), 1, 1, 1, device=pixels.device)
        return pixels * contrast + self.jitter * torch.randn(*pixels.shape[:2], 1, 1, device=pixels.device)

    def _on_grid(self, tokens: Tensor, details: Tensor) -> Tensor:
        """Return tokens (B, C, h, w) resampled to the grid of the details, with aligned cell centres."""
        if self.patch_size % STRIDE == 0:
            return F.interpolate(tokens, details.shape[-2:], mode="bilinear")
        # the last detail cell may extend beyond the last token, which is therefore replicated
        beyond = F.pad(tokens, (0, 1, 0, 1), mode="replicate")
        enlarged = F.interpolate(beyond, scale_factor=self.patch_size / STRIDE, mode="bilinear")
        return enlarged[..., : details.shape[-2], : details.shape[-1]]


class _Strips(nn.Module):
    """Residual block: sum of a 3x3 convolution and depthwise strip convolutions along rows and columns."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.near = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.row = nn.Conv2d(channels, channels, (1, _REACH), padding=(0, _REACH // 2), groups=channels, bias=False)
        self.column = nn.Conv2d(channels, channels, (_REACH, 1), padding=(_REACH // 2, 0), groups=channels, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, grid: Tensor) -> Tensor:
        return grid + F.relu(self.norm(self.near(grid) + self._along_rows(grid) + self.column(grid)))

    def _along_rows(self, grid: Tensor) -> Tensor:
        if grid.device.type != "cpu" or not (self.training and torch.is_grad_enabled()):
            return self.row(grid)
        # CPUs take up to nine times as long for row gradients as for column gradients
        turned = grid.transpose(2, 3).contiguous(memory_format=torch.channels_last)
        columns = F.conv2d(
            turned, self.row.weight.transpose(2, 3), padding=(_REACH // 2, 0), groups=len(self.row.weight)
        )
        return columns.transpose(2, 3)


def _convolution(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> nn.Sequential:
    padding = (kernel_size - 1) // 2
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU())


def _smooth(scores: Tensor) -> Tensor:
    """Filter scores (B, K, h, w) by (1, 2, 1) / 4 along both axes, with replicated borders.

    Upsampled without it, sharp edges lie midway between two cells more often than elsewhere.
    """
    corners = F.avg_pool2d(scores, 2, stride=1, padding=1, count_include_pad=False)  # (B, K, h + 1, w + 1)
    return F.avg_pool2d(corners, 2, stride=1)


def _as_levels(images: Tensor) -> Tensor:
    """Return images in 0..1 as levels of 8 bits; as 16 bits if 8 bits would round one."""
    levels = images * 255
    is_exact = images.is_meta or bool(((levels - levels.round()).abs() < 0.25 / 257).all())
    dtype = torch.uint8 if is_exact else torch.uint16
    most = torch.iinfo(dtype).max
    return (images * most).round().clamp(0, most).int().to(dtype)


def _first(scores: Tensor, height: int, width: int) -> Tensor:
    """Return the first rows and columns of scores (B, K, h, w).

    A slice would not do: a trace fixes whether anything was cut off, so the exported file would refuse other image
    sizes.
    """
    rows, columns = (torch.arange(side, device=scores.device) for side in (height, width))
    return scores.index_select(-2, rows).index_select(-1, columns)
