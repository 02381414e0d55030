"""Conversion between pixel masks and soft labels on the feature grid, with one channel per object."""

import logging

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dinoseg.extensions.clips.videos import VOID
from dinoseg.extensions.tracking.grid.cells import label_count, one_hot
from dinoseg.extensions.tracking.propagation.settings import DINOV3, PropagationSettings
from dinoseg.utils.errors import UserError
from dinoseg.utils.wording import join_names

logger = logging.getLogger(__name__)
_FLAT = 1e-6  # relative range below which a channel counts as constant


class ObjectChannels:
    """Mapping from the channels of a video's soft labels to object IDs: `ids`, which starts with the background, 0.

    Channels exist only for IDs that occurred, because each channel costs memory and time.

    Args:
        settings: conversion between masks and labels.
        patch_size: patch size of the backbone.
    """

    def __init__(self, settings: PropagationSettings, patch_size: int) -> None:
        self._settings, self._patch_size = settings, patch_size
        self.ids = [0]

    def labels(self, mask: np.ndarray, grid: tuple[int, int], frame: int) -> Tensor:
        """Return the labels (L, h, w) of a mask (H, W) uint8, and add channels for new objects.

        Warns about objects that cover no grid cell, with the number of their frame.
        """
        in_mask = [int(label) for label in np.unique(mask) if label not in (0, VOID)]
        self.ids += [label for label in in_mask if label not in self.ids]
        channels = np.zeros(256, np.uint8)  # channel of each ID; void is background
        channels[self.ids] = range(len(self.ids))
        labels = first_labels(torch.from_numpy(channels[mask]), grid, self._settings, num_labels=len(self.ids))
        lost = [str(label) for label in in_mask if not labels[self.ids.index(label)].any()]
        if lost:
            logger.warning(
                "Frame %d: too small for the centre of a grid cell, so not tracked: object %s. Set a larger "
                "tracker.short_side, or tracker.first=bilinear. If these ids are no objects, the mask was "
                "saved with smooth edges: save it without.",
                frame,
                join_names(lost),
            )
        return labels

    def winners(self, soft: Tensor, size: tuple[int, int]) -> Tensor:
        """Return the winning channels (H, W) uint8 of soft labels (L, h, w), on their device."""
        return to_mask(soft, size, self._settings, patch_size=self._patch_size)

    def mask(self, channels: Tensor) -> np.ndarray:
        """Return the mask (H, W) uint8 of object IDs for channels (H, W)."""
        return np.array(self.ids, np.uint8)[channels.cpu().numpy()]


def first_labels(
    mask: Tensor, grid: tuple[int, int], settings: PropagationSettings = DINOV3, *, num_labels: int | None = None
) -> Tensor:
    """Return the labels (L, h, w) of a mask of IDs (H, W) on a feature grid (h, w), resized by `settings.first`.

    L is `num_labels`, or the highest ID + 1. An object that covers no cell's centre has an empty channel, except with
    `settings.first` "bilinear".

    Raises:
        UserError: an ID is outside 0..255 or 0..L-1, or the mask is not (H, W).
    """
    if mask.ndim != 2 or not mask.numel():
        raise UserError(f"The mask has the shape {tuple(mask.shape)}. Give one id for each pixel: (H, W).")
    num_labels = label_count(mask, num_labels)
    # one rule for each protocol: nearest is DINO's, nearest_exact DINOv3's, and bilinear CRW's
    if settings.first == "nearest":
        return one_hot(_nearest_by_pillow(mask.to(torch.uint8), grid), num_labels)
    if settings.first == "nearest_exact":
        return one_hot(F.interpolate(mask[None, None].float(), grid, mode="nearest-exact")[0, 0], num_labels)
    # one label at full size at a time; in float32, weights match OpenCV's to only 5 digits
    single = ((mask == label)[None, None].double() for label in range(num_labels))
    return torch.cat([F.interpolate(label, grid, mode="bilinear")[0].float() for label in single])


@torch.no_grad()
def to_mask(
    soft: Tensor, size: tuple[int, int], settings: PropagationSettings = DINOV3, *, patch_size: int | None = None
) -> Tensor:
    """Return the winning IDs (H, W), uint8, of soft labels (L, h, w), using `settings.upsample` and `settings.min_max`.

    The lowest of equal labels wins. `patch_size` is needed for "patch_bilinear" only. Memory is that of a few channels
    of `size`, independent of L.

    Raises:
        UserError: `patch_size` is missing, or there are more than 256 labels.
    """
    if len(soft) > 256:
        raise UserError(f"A mask has at most 256 ids; there are {len(soft)} labels. Track fewer objects at once.")
    decision_size = _decision_size(soft, size, settings, patch_size)
    best = torch.full(decision_size, -torch.inf, device=soft.device, dtype=soft.dtype)
    ids = torch.zeros(decision_size, device=soft.device, dtype=torch.uint8)
    mode = "nearest" if settings.upsample == "nearest" else "bilinear"
    # a channel at a time, compared with the best so far; strictly, so that the lowest of equal labels stays
    for label, channel in enumerate(soft):
        scores = _stretch_scores(F.interpolate(channel[None, None], decision_size, mode=mode)[0, 0], settings.min_max)
        wins = scores > best
        best = torch.where(wins, scores, best)
        ids.masked_fill_(wins, label)
    return ids if decision_size == tuple(size) else _nearest_by_pillow(ids, size)


def _nearest_by_pillow(ids: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize with Pillow, which differs from torch if a cell's centre lies between two pixels."""
    resized = Image.fromarray(ids.cpu().numpy()).resize((size[1], size[0]), Image.Resampling.NEAREST)
    return torch.from_numpy(np.array(resized)).to(ids.device)


def _decision_size(
    soft: Tensor, size: tuple[int, int], settings: PropagationSettings, patch_size: int | None
) -> tuple[int, int]:
    if settings.upsample != "patch_bilinear":
        return size[0], size[1]
    if patch_size is None:
        raise UserError(
            "upsample=patch_bilinear needs the backbone's patch_size. Give it, or choose upsample=bilinear."
        )
    return soft.shape[1] * patch_size, soft.shape[2] * patch_size


def _stretch_scores(scores: Tensor, min_max: str) -> Tensor:
    if min_max == "none":
        return scores
    # (x - min) / (max - min) over the frame changes which label wins, so published scores need it
    low, high = scores.amin(), scores.amax()
    flat = high - low <= _FLAT * torch.maximum(high.abs(), low.abs())
    stretched = ((scores - low) / (high - low)).masked_fill_(flat, torch.inf if min_max == "positive" else 0.0)
    return torch.where(high <= 0, scores, stretched) if min_max == "positive" else stretched
