"""Pseudo-labels for the frames between two masks: propagated forward and backward, valid where both agree."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dinoseg.tracking.grid.propagator import propagate
from dinoseg.tracking.propagation.masks import first_labels, to_mask
from dinoseg.tracking.propagation.settings import DINOV3, PropagationSettings

BACKGROUND = 0


class Agreed(NamedTuple):
    """Labels of one frame on which forward and backward propagation agree.

    `agreement` is the fraction of pixels with equal classes, among those that either direction labels as an object; 1
    if there is none.
    """

    mask: np.ndarray  # (H, W) uint8, ignored where the directions differ
    agreement: float


def between(
    features: Tensor,
    first: np.ndarray,
    last: np.ndarray,
    settings: PropagationSettings = DINOV3,
    *,
    patch_size: int,
    ignore_index: int = 255,
) -> Iterator[Agreed]:
    """Yield labels for frames 1..T-2 from the masks (H, W) uint8 of frames 0 and T-1.

    The grid of the features (T, C, h, w) covers the frames exactly. Ignored pixels of a mask are propagated like a
    class, and are ignored in the result.
    """
    size = (first.shape[0], first.shape[1])
    ways = []
    for seen, mask in ((features, first), (features.flip(0), last)):
        ids, channels = np.unique(mask, return_inverse=True)
        ways.append((ids, _propagated(seen, channels.reshape(size).astype(np.uint8), settings)))
    for number in range(1, len(features) - 1):
        there, back = (
            ids[to_mask(soft[position], size, settings, patch_size=patch_size).cpu().numpy()]
            for position, (ids, soft) in zip((number, len(features) - 1 - number), ways, strict=True)
        )
        yield agree(there, back, ignore_index)


def agree(one: np.ndarray, other: np.ndarray, ignore_index: int = 255) -> Agreed:
    """Return the labels on which two masks (H, W) agree; pixels ignored in either are ignored and not counted."""
    known = (one != ignore_index) & (other != ignore_index)
    same = known & (one == other)
    objects = known & ((one != BACKGROUND) | (other != BACKGROUND))
    mask = np.where(same, one, ignore_index).astype(np.uint8)
    return Agreed(mask, float((same & objects).sum() / objects.sum()) if objects.any() else 1.0)


def _propagated(features: Tensor, channels: np.ndarray, settings: PropagationSettings) -> Tensor:
    """Return the soft labels (T, L, h, w) propagated from frame 0's channels (H, W), numbered from 0."""
    labels = first_labels(torch.from_numpy(channels), (features.shape[2], features.shape[3]), settings)
    return propagate(features, labels.to(features.device), settings=settings)
