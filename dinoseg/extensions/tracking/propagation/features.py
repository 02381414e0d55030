"""Backbone features for label propagation: last map of frames resized so that the grid covers them exactly."""

from collections.abc import Sequence

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dinoseg.core.contracts import Backbone
from dinoseg.extensions.tracking.propagation.settings import PropagationSettings
from dinoseg.extensions.tracking.tracker import Autocast, Size
from dinoseg.utils.devices import to_device
from dinoseg.utils.errors import UserError


def last_maps(
    backbone: Backbone,
    frames: Sequence[np.ndarray],
    settings: PropagationSettings,
    device: torch.device,
    autocast: Autocast,
) -> Tensor:
    """Return a backbone's last map (B, C, h, w) for frames (H, W, 3) uint8 RGB of one size, resized by `settings`.

    Args:
        backbone: backbone in eval mode, on `device`.
        frames: frames of one forward pass.
        settings: target size and resampling.
        device: device of the backbone.
        autocast: context manager factory of the precision.
    """
    size = input_size((frames[0].shape[0], frames[0].shape[1]), settings, backbone.patch_size)
    resized = np.stack([resize(frame, size, settings.resample) for frame in frames])
    images = to_device(torch.from_numpy(resized), device).permute(0, 3, 1, 2).float() / 255  # (B, 3, H, W)
    with autocast():
        return backbone(images)[-1]  # (B, C, h, w)


def input_size(size: Size, settings: PropagationSettings, patch_size: int) -> Size:
    """Return the (H, W) to which a frame of `size` is resized.

    The shorter side is `settings.short_side`, rounded to a multiple of the patch size. The longer side is scaled in
    proportion and rounded to `settings.long_multiple`. Each side is at least one multiple. A frame smaller than
    `settings.short_side` is only enlarged if `settings.enlarge` is set.

    Raises:
        UserError: `long_multiple` is no multiple of the patch size.
    """
    multiple = settings.long_multiple or patch_size
    if multiple % patch_size:
        raise UserError(
            f"tracker.long_multiple={multiple} is not a multiple of the backbone's patch size, {patch_size}: the grid "
            "would extend beyond the frame. Set tracker.long_multiple=null to use the patch size."
        )
    short, long = min(size), max(size)
    wanted = settings.short_side
    if wanted is not None and not settings.enlarge and wanted >= short:
        wanted = None
    # DINOv3 rounds both sides up to the patch size; DINO scales to 480 and rounds the longer side down to 64
    new_short = _round_to_multiple(wanted or short, 1, patch_size, settings.rounding)
    new_long = _round_to_multiple(long * (new_short if wanted else short), short, multiple, settings.rounding)
    return (new_short, new_long) if size[0] <= size[1] else (new_long, new_short)


def resize(frame: np.ndarray, size: Size, resample: str) -> np.ndarray:
    """Resize a frame (H, W, 3) uint8 to `size` (H, W): "bilinear" with OpenCV, "bicubic" with Pillow."""
    height, width = size
    if frame.shape[:2] == (height, width):
        return frame
    # cv2 as in DINO's script, Pillow as in DINOv3's notebook: their pixels differ
    if resample == "bilinear":
        return np.asarray(cv2.resize(frame, (width, height), interpolation=cv2.INTER_LINEAR))
    return np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC))


def _round_to_multiple(dividend: int, divisor: int, multiple: int, rounding: str) -> int:
    """Return dividend / divisor rounded to a multiple, in integer arithmetic, which has no rounding errors."""
    count = dividend // (divisor * multiple) if rounding == "down" else -(-dividend // (divisor * multiple))
    return max(1, count) * multiple
