"""What a backbone sees of frames, and how precisely it computes."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinoseg.tracking.frame_size import input_size, resize
from dinoseg.tracking.propagation.settings import Settings

Autocast = Callable[[], AbstractContextManager]


def last_maps(
    backbone: Any, frames: Sequence[np.ndarray], settings: Settings, device: torch.device, autocast: Autocast
) -> Tensor:
    """Return a backbone's last map (B, C, h, w) of frames (H, W, 3) uint8 RGB of one size, resized as `settings` say.

    Args:
        backbone: in eval mode, on `device`.
        frames: seen at once.
        settings: how they are resized.
        device: where the backbone is.
        autocast: gives the precision's context for a forward pass.
    """
    size = input_size((frames[0].shape[0], frames[0].shape[1]), settings, backbone.patch_size)
    resized = np.stack([resize(frame, size, settings.resample) for frame in frames])
    images = torch.from_numpy(resized).to(device).permute(0, 3, 1, 2).float() / 255  # (B, 3, H, W)
    with autocast():
        return backbone(images)[-1]  # (B, C, h, w)


def precision_of(autocast: Autocast, device: torch.device) -> str:
    """Return the name of the number type of a forward pass in a precision's context, such as bfloat16."""
    with autocast():
        half = torch.is_autocast_enabled(device.type)
        used = torch.get_autocast_dtype(device.type) if half else torch.float32
    return str(used).removeprefix("torch.")
