"""Between masks of pixels and soft labels on the feature grid."""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dinoseg.errors import UserError
from dinoseg.tracking.propagation.settings import DINOV3, Settings

_FLAT = 1e-6  # a channel that varies less than this share of its largest value is constant but for rounding


def one_hot(ids: Tensor, num_labels: int | None = None) -> Tensor:
    """Return ids (H, W) as labels (L, H, W), float32: L is `num_labels`, or the highest id + 1.

    Raises:
        UserError: for an id outside of 0..255 or of 0..L-1.
    """
    num_labels = _count(ids, num_labels)
    return torch.stack([ids == label for label in range(num_labels)]).float()


def first_labels(
    mask: Tensor, grid: tuple[int, int], settings: Settings = DINOV3, *, num_labels: int | None = None
) -> Tensor:
    """Return the labels (L, h, w) of a mask of ids (H, W) on a feature grid (h, w), as `settings.first` says.

    L is `num_labels`, or the highest id + 1. An object that lies under no cell's centre has an empty channel, except
    where the way is "bilinear".

    Raises:
        UserError: for ids outside of 0..255 or of 0..L-1, or a mask that is not (H, W).
    """
    if mask.ndim != 2 or not mask.numel():
        raise UserError(f"The mask has the shape {tuple(mask.shape)}. Give one id for each pixel: (H, W).")
    num_labels = _count(mask, num_labels)
    if settings.first == "nearest":
        return one_hot(_nearest_by_pillow(mask.to(torch.uint8), grid), num_labels)
    if settings.first == "nearest_exact":
        return one_hot(F.interpolate(mask[None, None].float(), grid, mode="nearest-exact")[0, 0], num_labels)
    # One label at full size at a time, and in double precision: in single its weights are OpenCV's to 5 digits only.
    single = ((mask == label)[None, None].double() for label in range(num_labels))
    return torch.cat([F.interpolate(label, grid, mode="bilinear")[0].float() for label in single])


@torch.no_grad()
def to_mask(
    soft: Tensor, size: tuple[int, int], settings: Settings = DINOV3, *, patch_size: int | None = None
) -> Tensor:
    """Return the winning ids (H, W), uint8, of soft labels (L, h, w), as `settings.upsample` and `.min_max` say.

    Of equal labels the lowest id wins. `patch_size` is needed for "patch_bilinear" only. Needs the memory of a few
    channels of `size`, whatever L.

    Raises:
        UserError: for a missing `patch_size`, or more than 256 labels.
    """
    if len(soft) > 256:
        raise UserError(f"{len(soft)} labels do not fit into a mask of 256 ids. Track fewer objects at once.")
    decided = _decision_size(soft, size, settings, patch_size)
    best = torch.full(decided, -torch.inf, device=soft.device, dtype=soft.dtype)
    ids = torch.zeros(decided, device=soft.device, dtype=torch.uint8)
    mode = "nearest" if settings.upsample == "nearest" else "bilinear"
    for label, channel in enumerate(soft):
        scores = _stretched(F.interpolate(channel[None, None], decided, mode=mode)[0, 0], settings.min_max)
        wins = scores > best
        best[wins] = scores[wins]
        ids[wins] = label
    return ids if decided == tuple(size) else _nearest_by_pillow(ids, size)


def _count(ids: Tensor, num_labels: int | None) -> int:
    low, high = int(ids.min()), int(ids.max())
    num_labels = high + 1 if num_labels is None else num_labels
    if low < 0 or high >= min(num_labels, 256):
        raise UserError(
            f"The mask holds the id {low if low < 0 else high}: ids here are 0 to {min(num_labels - 1, 255)}, 0 is the "
            "background. Renumber the objects."
        )
    return num_labels


def _nearest_by_pillow(ids: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize as Pillow does: it and torch choose another pixel where a cell's centre lies between two."""
    resized = Image.fromarray(ids.cpu().numpy()).resize((size[1], size[0]), Image.Resampling.NEAREST)
    return torch.from_numpy(np.array(resized)).to(ids.device)


def _decision_size(soft: Tensor, size: tuple[int, int], settings: Settings, patch_size: int | None) -> tuple[int, int]:
    if settings.upsample != "patch_bilinear":
        return size[0], size[1]
    if patch_size is None:
        raise UserError(
            "upsample=patch_bilinear needs the backbone's patch_size. Give it, or choose upsample=bilinear."
        )
    return soft.shape[1] * patch_size, soft.shape[2] * patch_size


def _stretched(scores: Tensor, min_max: str) -> Tensor:
    low, high = scores.amin(), scores.amax()
    if min_max == "none" or (min_max == "positive" and high <= 0):
        return scores
    if high - low <= _FLAT * torch.maximum(high.abs(), low.abs()):
        return torch.full_like(scores, torch.inf if min_max == "positive" else 0.0)
    return (scores - low) / (high - low)
