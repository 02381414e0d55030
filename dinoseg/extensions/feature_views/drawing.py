"""Pictures of projected features at the size of their image."""

from typing import Literal

import numpy as np
import torch

from dinoseg.core.geometry import upsample, valid_share
from dinoseg.core.sizes import Size

Upsample = Literal["nearest", "bilinear"]


def enlarge(values: np.ndarray, size: Size, seen: Size, patch_size: int, how: Upsample = "nearest") -> np.ndarray:
    """Return values of patches (h, w, K) at the pixels (H, W, K) of an image; padding of the last patches is left out.

    Args:
        values: floats.
        size: (H, W) of the image.
        seen: (H, W) at which the backbone saw it.
        patch_size: side of a patch in pixels.
        how: `nearest`: each pixel has the value of its patch; or `bilinear` between the centres of patches.
    """
    if how == "nearest":
        rows, columns = (
            ((2 * np.arange(length) + 1) * side) // (2 * length * patch_size)
            for length, side in zip(size, seen, strict=True)
        )
        return values[rows[:, None], columns]
    maps = torch.from_numpy(np.ascontiguousarray(values, np.float32)).permute(2, 0, 1)[None]
    return upsample(maps, size, valid_share(seen, patch_size))[0].permute(1, 2, 0).numpy()


def to_bytes(colours: np.ndarray) -> np.ndarray:
    """Return colours (H, W, K) in 0..1 as RGB (H, W, 3) uint8; of one component as grey, of two without blue."""
    levels = np.rint(colours * 255).astype(np.uint8)
    if levels.shape[2] == 1:
        return np.repeat(levels, 3, axis=2)
    return np.pad(levels, ((0, 0), (0, 0), (0, 3 - levels.shape[2])))
