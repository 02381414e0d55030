"""What a tracker's masks were made by, in plain values: a run is only gone on with where these are equal."""

from typing import Any

import torch
from torch import nn

from dinoseg.models.model import Segmenter, fingerprint
from dinoseg.tracking.tracker import Autocast


def weights_of(module: nn.Module) -> str:
    """Return the fingerprint of a module's parameters and buffers."""
    return fingerprint((*module.named_parameters(), *module.named_buffers()))


def model_settings(model: Segmenter) -> dict[str, Any]:
    """Return what a segmenter's outputs depend on beside the pixels."""
    return {"weights": weights_of(model), "scale": model.scale, "longest": model.longest}


def precision_of(autocast: Autocast, device: torch.device) -> str:
    """Return the name of the number type of a forward pass in a precision's context, such as bfloat16."""
    with autocast():
        half = torch.is_autocast_enabled(device.type)
        used = torch.get_autocast_dtype(device.type) if half else torch.float32
    return str(used).removeprefix("torch.")
