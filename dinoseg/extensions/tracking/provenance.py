"""Settings that a tracker's masks depend on, as plain values; a run resumes only if they are equal."""

from typing import Any

import torch
from torch import nn

from dinoseg.extensions.tracking.tracker import Autocast
from dinoseg.models.model import SegmentationModel, fingerprint


def weights_of(module: nn.Module) -> str:
    """Return the fingerprint of a module's parameters and buffers."""
    return fingerprint((*module.named_parameters(), *module.named_buffers()))


def model_settings(model: SegmentationModel) -> dict[str, Any]:
    """Return what a segmenter's outputs depend on besides the pixels: weights and resolution."""
    return {"weights": weights_of(model), "scale": model.scale, "longest": model.longest}


def precision_of(autocast: Autocast, device: torch.device) -> str:
    """Return the dtype of a forward pass under `autocast`, such as "bfloat16"."""
    with autocast():
        half = torch.is_autocast_enabled(device.type)
        used = torch.get_autocast_dtype(device.type) if half else torch.float32
    return str(used).removeprefix("torch.")
