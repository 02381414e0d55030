"""Frozen layers that cache the half-precision copy of their weights, which autocast would make in every forward pass.

Autocast caches casts only of weights that require a gradient. The float32 weights remain: checkpoints, hashes and
passes outside autocast read them.
"""

from typing import Any

import torch
from torch import Tensor, nn

from dinoseg.models.backbones.patch_projection import PatchProjection


def cache_casts(model: nn.Module) -> None:
    """Make each frozen linear layer and 2D convolution of a model cast its weights once; results are bitwise equal."""
    for part in model.modules():
        kind = _KINDS.get(type(part))
        if kind is not None and not any(parameter.requires_grad for parameter in part.parameters()):
            # parameters, hooks and names stay, so checkpoints and adapters see the same layer
            part.__class__ = kind


def _cast(layer: nn.Linear | nn.Conv2d, like: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return weight and bias as autocast casts them for a product with `like`, from `layer.kept` while that is valid.

    Writes through `.data` have to call `torch.autograd.graph.increment_version`, as `adapters.merge` does.
    """
    weight, bias, device_type = layer.weight, layer.bias, like.device.type
    if torch.compiler.is_compiling() or not torch.is_autocast_enabled(device_type) or weight.requires_grad:
        return weight, bias
    if weight.dtype != torch.float32 or like.dtype == torch.float64:  # not cast by autocast
        return weight, bias
    # `_version` counts writes in place; the address changes with an assignment to `.data`, which it does not count
    dtype, parts = torch.get_autocast_dtype(device_type), (weight, bias)
    version: list[Any] = [dtype, weight.device]
    version += [None if part is None else (part._version, _address(part)) for part in parts]
    casts: Any = vars(layer).get("kept")
    if casts is None or casts[0] is not weight or casts[1] is not bias or casts[2] != version:
        # copies made in inference mode could not be saved for a later backward pass
        with torch.inference_mode(False), torch.no_grad():
            casts = vars(layer)["kept"] = *parts, version, *(None if part is None else part.to(dtype) for part in parts)
    return casts[3:]


def _address(value: Tensor) -> int:
    """Return the address of a tensor's storage, which changes on assignment to `.data`."""
    return value.untyped_storage()._cdata


class _Linear(nn.Linear):
    def forward(self, inputs: Tensor) -> Tensor:
        """Apply the layer as `nn.Linear` does."""
        return nn.functional.linear(inputs, *_cast(self, inputs))


class _Conv2d(nn.Conv2d):
    def forward(self, inputs: Tensor) -> Tensor:
        """Apply the layer as `nn.Conv2d` does."""
        return self._conv_forward(inputs, *_cast(self, inputs))


class _PatchProjection(_Conv2d, PatchProjection):
    pass


_KINDS: dict[type, type] = {nn.Linear: _Linear, nn.Conv2d: _Conv2d, PatchProjection: _PatchProjection}
