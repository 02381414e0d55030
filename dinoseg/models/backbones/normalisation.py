"""Colour statistics for the normalisation of images."""

import math
from collections.abc import Sequence

import torch
from torch import nn

from dinoseg.utils.errors import UserError


def register_colours(module: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
    """Register the RGB mean and standard deviation as non-persistent buffers `mean` and `std`, (3, 1, 1).

    Raises:
        UserError: not three finite numbers, or a standard deviation that is not above 0.
    """
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != 3 or not all(math.isfinite(value) for value in values):
            raise UserError(f"backbone.{name}={list(values)}: give three numbers, one each for red, green and blue.")
        if name == "std" and min(values) <= 0:
            raise UserError(
                f"backbone.std={list(values)}: images are divided by these values; give three numbers above 0."
            )
        module.register_buffer(name, torch.tensor([float(value) for value in values]).view(3, 1, 1), persistent=False)
