"""First convolutions of backbones: patch embeddings, and their adaptation to any number of channels."""

import re
from collections.abc import Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinoseg.utils.errors import UserError
from dinoseg.utils.ranges import Range

ChannelWeight = Annotated[float, Range("a number from -10 to 10", -10, 10)]
_COLOURS = 3
_STANDARDISED = re.compile("Std|Standard")  # in the names of classes that normalise their kernel over all channels


class InputConvolution(nn.Conv2d):
    """Convolution on pixels that adds what channels after the first three contribute to the result of the three.

    Weights of zero in further channels thus leave the result of the first three unchanged to the bit. One kernel over
    all channels may add up in another order.
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return (B, dim, h, w) for pixels (B, C, H, W)."""
        if weight.shape[1] <= _COLOURS:
            return self._convolve(input, weight, bias)
        colours = self._convolve(input[:, :_COLOURS], weight[:, :_COLOURS], bias)
        return colours + self._convolve(input[:, _COLOURS:], weight[:, _COLOURS:], None)

    def _convolve(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight, bias)


class PatchProjection(InputConvolution):
    """Convolution whose stride is its kernel size, as a matrix product of patches for inference on CUDA.

    There, cuDNN takes 7 times as long in bfloat16 (patches of 16, an H100).
    """

    def _convolve(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return (B, dim, h, w) for pixels (B, C, H, W) whose sides are multiples of the patch size."""
        if not input.is_cuda or torch.is_grad_enabled():
            return super()._convolve(input, weight, bias)
        rows, columns = self.kernel_size
        patches = input.unflatten(3, (-1, columns)).unflatten(2, (-1, rows))  # (B, C, h, rows, w, columns)
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3)  # (B, h, w, C * rows * columns)
        return F.linear(patches, weight.flatten(1), bias).permute(0, 3, 1, 2)


def adapt_input_kernel(kernel: Tensor, channels: int, channel_weights: Sequence[float] | None) -> Tensor:
    """Return the kernel (dim, channels, h, w) for other channels than RGB, from that for RGB (dim, 3, h, w).

    Channel c has the kernel of colour c mod 3, times its weight. A single channel has the sum of the three, as a grey
    image has equal colours. Without weights, the values are those of timm's `adapt_input_conv`: each weight of three
    or more channels is 3 / channels, so that the sum over channels stays of the same size.
    """
    if channels == 1:
        adapted = kernel.sum(dim=1, keepdim=True)
        weights = [1.0] if channel_weights is None else channel_weights
    else:
        adapted = kernel.repeat(1, -(-channels // _COLOURS), 1, 1)[:, :channels]
        weights = [_COLOURS / channels] * channels if channel_weights is None else channel_weights
    return adapted * kernel.new_tensor(weights)[:, None, None]


def adapt_input(convolution: nn.Conv2d, channels: int, channel_weights: Sequence[float] | None) -> None:
    """Adapt the first convolution of a backbone to the number of channels of its images, in place.

    Args:
        convolution: with the weights of the backbone.
        channels: number of channels.
        channel_weights: see `adapt_input_kernel`.

    Raises:
        UserError: the weights are for neither three nor `channels` channels, or are standardised over them, or
            `channel_weights` has another length, or zeros only.
    """
    if channel_weights is not None and len(channel_weights) != channels:
        raise UserError(
            f"channel_weights={list(channel_weights)} has {len(channel_weights)} numbers, and channels={channels}. "
            "Give one for each channel."
        )
    if channel_weights is not None and not any(channel_weights):
        raise UserError(f"channel_weights={list(channel_weights)}: images have no effect. Give one above 0.")
    if channels > _COLOURS and type(convolution) is nn.Conv2d:
        convolution.__class__ = InputConvolution
    stored = convolution.in_channels
    if channels == stored and channel_weights is None:
        return
    if stored != _COLOURS or convolution.groups != 1:
        raise UserError(
            f"The weights take images of {stored} channels, and channels={channels}, "
            f"channel_weights={channel_weights}. Only weights of 3 channels can be adapted to others: set "
            f"channels={stored}, and leave channel_weights out."
        )
    if _STANDARDISED.search(type(convolution).__name__):
        raise UserError(
            f"channels={channels}: the first convolution, a {type(convolution).__name__}, standardises its weights "
            f"over all channels. It cannot be adapted: set channels={stored}, or choose another backbone."
        )
    kernel = adapt_input_kernel(convolution.weight.detach(), channels, channel_weights)
    convolution.weight = nn.Parameter(kernel)
    convolution.in_channels = channels
