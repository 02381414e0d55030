"""Feature pyramids from a transformer's maps, and checks for heads that need a single grid."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from dinoseg.core.geometry import widths
from dinoseg.utils.errors import UserError

NUM_LEVELS = 4


class Reassemble(nn.Module):
    """Convert four maps to a pyramid, finest first.

    A transformer's maps, all on the patch grid h x w, are resized to 4h x 4w, 2h x 2w, h x w and half of it, rounded
    up. Transposed convolutions and a halving do this, as in the reassembly of Ranftl et al. (arXiv 2103.13413) but
    without the readout of the class token. A pyramid's maps keep their grids. Each map is first projected to its
    number of channels.

    Args:
        in_dim: the width of a transformer's maps, or the list of a pyramid's widths.
        channels: output channels of the four levels.
    """

    def __init__(self, in_dim: int | Sequence[int], channels: Sequence[int]) -> None:
        super().__init__()
        pairs = zip(widths(in_dim, NUM_LEVELS), channels, strict=True)
        self.project = nn.ModuleList(nn.Conv2d(width, out, kernel_size=1) for width, out in pairs)
        first, second, _, last = channels
        self.rescale = nn.ModuleList(nn.Identity() for _ in channels)
        if isinstance(in_dim, int):
            self.rescale[0] = nn.ConvTranspose2d(first, first, kernel_size=4, stride=4)
            self.rescale[1] = nn.ConvTranspose2d(second, second, kernel_size=2, stride=2)
            self.rescale[3] = _Halve(last)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Return four maps, all covering the same area."""
        return [
            rescale(project(part)) for part, project, rescale in zip(features, self.project, self.rescale, strict=True)
        ]


class _Halve(nn.Module):
    """3x3 convolution, then bilinear resampling to half the grid, rounded up.

    On even grids a strided convolution would be centred half a token off the middle of each cell, and the features
    would come back shifted.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, padding=1)

    def forward(self, part: Tensor) -> Tensor:
        height, width = part.shape[-2:]
        return F.interpolate(self.conv(part), ((height + 1) // 2, (width + 1) // 2), mode="bilinear")


def refuse_unless_four(head: str, num_layers: int) -> None:
    """Refuse any number of maps other than four."""
    if num_layers != NUM_LEVELS:
        raise UserError(
            f"The head {head} reads four feature maps, but num_layers={num_layers}. Set layers=quarters or name four "
            f"blocks, or choose a head that takes any number: linear, mlp or cnn."
        )


def one_grid_width(head: str, in_dim: int | Sequence[int], num_layers: int) -> int:
    """Return the summed width of maps on one grid; refuse the maps of a pyramid."""
    if not isinstance(in_dim, int) and num_layers > 1:
        raise UserError(
            f"The head {head} needs one patch grid, but gets {num_layers} maps of a pyramid, each with its own grid. "
            "Set layers=[-1], or choose the head linear, multiscale, dpt or upernet."
        )
    return sum(widths(in_dim, num_layers))
