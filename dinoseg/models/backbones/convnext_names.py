"""The names of Meta's DINOv3 ConvNeXt checkpoints, and those of the same tensors on the hub."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

_RENAMED = (
    (r"downsample_layers\.(\d+)\.(\d+)\.(.+)", r"stages.\1.downsample_layers.\2.\3"),
    (r"stages\.(\d+)\.(\d+)\.dwconv\.(.+)", r"stages.\1.layers.\2.depthwise_conv.\3"),
    (r"stages\.(\d+)\.(\d+)\.norm\.(.+)", r"stages.\1.layers.\2.layer_norm.\3"),
    (r"stages\.(\d+)\.(\d+)\.pwconv([12])\.(.+)", r"stages.\1.layers.\2.pointwise_conv\3.\4"),
    (r"stages\.(\d+)\.(\d+)\.gamma", r"stages.\1.layers.\2.gamma"),
    (r"norm\.(.+)", r"layer_norm.\1"),
)


def is_meta_convnext(state: Mapping[str, Tensor]) -> bool:
    """Return whether a checkpoint's keys are those of Meta's ConvNeXt."""
    return "downsample_layers.0.0.weight" in state


def convnext_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of Meta's ConvNeXt checkpoint under the hub's names.

    Meta's file holds the final norm twice, as `norm` and as `norms.3` (the norm of the last of four stages; the others
    have none): the second is left out where it is the same. A key that no rule knows stays as it is, for the loader to
    refuse.
    """
    return {_renamed(key): value for key, value in state.items() if not _is_copy(key, value, state)}


def _renamed(key: str) -> str:
    for pattern, name in _RENAMED:
        if match := re.fullmatch(pattern, key):
            return match.expand(name)
    return key


def _is_copy(key: str, value: Tensor, state: Mapping[str, Tensor]) -> bool:
    original = state.get(key.replace("norms.3.", "norm.")) if key.startswith("norms.3.") else None
    return original is not None and torch.equal(original, value)
