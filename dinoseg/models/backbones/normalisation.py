"""Colour statistics for the normalisation of images."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
from torch import nn

from dinoseg.utils.errors import UserError
from dinoseg.utils.ranges import Range, check_annotations

logger = logging.getLogger(__name__)
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # RGB mean and standard deviation, in 0..1
SATELLITE = ((0.430, 0.411, 0.296), (0.213, 0.156, 0.143))  # of DINOv3's sat493m weights (facebookresearch/dinov3)
_SATELLITE_TAG = "sat493m"  # part of the names of these weights
# RGB statistics are those of images in 0..1: means in 0..1, standard deviations up to 0.5. A model that takes values of
# another scale expresses it by them, such as 0..255 by mean 0 and std 1 / 255.
MEANS = Range("a number from -1 to 2 (of images in 0..1; divide statistics of 0..255 by 255)", -1, 2)
DEVIATIONS = Range("a number from 0.001 to 10 (of images in 0..1; divide statistics of 0..255 by 255)", 0.001, 10)
ColourMean = Annotated[float, MEANS]
ColourStd = Annotated[float, DEVIATIONS]


def is_satellite(source: str) -> bool:
    """Return whether a hub id or path names DINOv3's satellite weights: `sat493m` in its last two parts."""
    return _SATELLITE_TAG in "/".join(Path(source).parts[-2:]).lower()


def resolve_colours(
    source: str,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    default: tuple[Sequence[float], Sequence[float]] = IMAGENET,
    channels: int = 3,
) -> tuple[Sequence[float], Sequence[float]]:
    """Return the mean and standard deviation of each channel of a backbone's images, in 0..1.

    Channels that the weights were not trained on get the average of red, green and blue: those after the third, and
    all of one or two.

    Args:
        source: hub id or path of the weights; the statistics of satellite ones (`is_satellite`) are logged.
        mean: given by the user; None: of the weights.
        std: as `mean`.
        default: statistics of all other weights.
        channels: number of channels.

    Raises:
        UserError: `mean` or `std` have another number of values.
    """
    found = SATELLITE if is_satellite(source) else default
    if found is SATELLITE and (mean is None or std is None):
        logger.info(
            "The weights %s are those of satellite images: normalised with mean %s and std %s. Set mean and std of the "
            "backbone to change this.", source, *map(list, SATELLITE),
        )  # fmt: skip
    return _for_channels("mean", mean, found[0], channels), _for_channels("std", std, found[1], channels)


def _for_channels(name: str, given: Sequence[float] | None, rgb: Sequence[float], channels: int) -> Sequence[float]:
    """Return the given values, or those of red, green and blue followed by their average."""
    if given is not None and len(given) != channels:
        raise UserError(f"{name}={list(given)}: give {channels} numbers, one for each channel.")
    if given is not None or channels == 3:
        return rgb if given is None else given
    average = sum(rgb) / 3
    values = [*rgb, *[average] * (channels - 3)] if channels > 3 else [average] * channels
    if not torch.empty(0).is_meta:  # a training also outlines the model on the meta device
        logger.info("%s=%s for %d channels. Set it in the backbone to change this.", name, values, channels)
    return values


@check_annotations
def register_colours(module: nn.Module, mean: Sequence[ColourMean], std: Sequence[ColourStd]) -> None:
    """Register the mean and standard deviation of each channel as non-persistent buffers `mean` and `std`, (C, 1, 1).

    Their length C is the number of channels of the images; three are RGB.

    Raises:
        UserError: none or different numbers of values, or one out of range.
    """
    if not 0 < len(mean) == len(std):
        raise UserError(f"mean={list(mean)} and std={list(std)}: give one number each per channel, three for RGB.")
    for name, values in (("mean", mean), ("std", std)):
        module.register_buffer(name, torch.tensor([float(value) for value in values]).view(-1, 1, 1), persistent=False)
