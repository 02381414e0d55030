"""Colour statistics for the normalisation of images."""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from dinoseg.utils.errors import UserError
from dinoseg.utils.ranges import DEVIATIONS, MEANS

logger = logging.getLogger(__name__)
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # RGB mean and standard deviation, in 0..1
SATELLITE = ((0.430, 0.411, 0.296), (0.213, 0.156, 0.143))  # of DINOv3's sat493m weights (facebookresearch/dinov3)
_SATELLITE_TAG = "sat493m"  # part of the names of these weights


def is_satellite(source: str) -> bool:
    """Return whether a hub id or path names DINOv3's satellite weights: `sat493m` in its last two parts."""
    return _SATELLITE_TAG in "/".join(Path(source).parts[-2:]).lower()


def resolve_colours(
    source: str,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    default: tuple[Sequence[float], Sequence[float]] = IMAGENET,
) -> tuple[Sequence[float], Sequence[float]]:
    """Return the RGB mean and standard deviation of a backbone's training images, in 0..1.

    Args:
        source: hub id or path of the weights; the statistics of satellite ones (`is_satellite`) are logged.
        mean: given by the user; None: of the weights.
        std: as `mean`.
        default: statistics of all other weights.
    """
    found = SATELLITE if is_satellite(source) else default
    if found is SATELLITE and (mean is None or std is None):
        logger.info(
            "The weights %s are those of satellite images: normalised with mean %s and std %s. Set mean and std of the "
            "backbone to change this.", source, *map(list, SATELLITE),
        )  # fmt: skip
    return found[0] if mean is None else mean, found[1] if std is None else std


def register_colours(module: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
    """Register the RGB mean and standard deviation as non-persistent buffers `mean` and `std`, (3, 1, 1).

    Raises:
        UserError: not three numbers, or one out of range.
    """
    for name, values, rule in (("mean", mean, MEANS), ("std", std, DEVIATIONS)):
        if len(values) != 3:
            raise UserError(f"{name}={list(values)}: give three numbers, one each for red, green and blue.")
        if not all(value in rule for value in values):
            raise UserError(f"{name}={list(values)} is out of range. Give {rule.rule} for each.")
        module.register_buffer(name, torch.tensor([float(value) for value in values]).view(3, 1, 1), persistent=False)
