"""Heads whose weights are their own mirror image: such a head must answer a mirrored map with a mirrored map."""

import torch
from torch import nn


def mirror_weights(head, equal_channels=False):
    """Average every kernel with its mirror images, and over its output channels if asked.

    A pixel shuffle spreads four channels over a 2 x 2 block, which is symmetric if they are equal.
    """
    for part in head.modules():
        if isinstance(part, nn.Conv2d | nn.ConvTranspose2d):
            weight = part.weight.detach()
            weight = (weight + weight.flip(-1)) / 2
            weight = (weight + weight.flip(-2)) / 2
            if equal_channels:
                weight = weight.mean(0, keepdim=True).expand_as(weight).clone()
                nn.init.constant_(part.bias, part.bias.mean().item())
            part.weight = nn.Parameter(weight)
    return head


def check_mirrored(head, grids, dims):
    """Mirror random maps along either axis, and ask for the mirrored output."""
    head = head.double().eval()
    for grid in grids:
        maps = [torch.randn(1, dim, *grid, dtype=torch.float64) for dim in dims]
        output = head(maps)
        assert output.std() > 1e-3 or grid == (1, 1)
        for axis in (-1, -2):
            mirrored = head([part.flip(axis) for part in maps])
            torch.testing.assert_close(mirrored.flip(axis), output, atol=1e-9, rtol=0)


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())
