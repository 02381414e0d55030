"""Models without initialised parameters: outlines on the meta device, and memory for a file with all values."""

from collections.abc import Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from dinoseg.models.model import SegmentationModel

_FILLS = ("uniform_", "normal_", "erfinv_", "mul_", "add_", "clamp_", "fill_", "zero_")
_PACKAGES = ("torch", "timm", "transformers", "peft", "dinoseg")  # of modules that `allocate` takes


def allocate(empty: SegmentationModel) -> bool:
    """Move an outline on the meta device to uninitialised memory on the CPU, for a file that holds all of its values.

    Returns:
        False for an unchanged model: a part of the user's own, or one with tensors besides parameters and buffers.
    """
    modules = list(empty.modules())
    if any(
        type(part).__module__.partition(".")[0] not in _PACKAGES or _has_unregistered_tensors(part) for part in modules
    ):
        return False
    replaced: dict[int, Any] = {}  # modules may share a tensor
    for held in (held for part in modules for held in (part._parameters, part._buffers)):
        for name, value in held.items():
            if value is not None and id(value) not in replaced:
                fresh = torch.empty_like(value, device="cpu")
                is_parameter = isinstance(value, torch.nn.Parameter)
                replaced[id(value)] = torch.nn.Parameter(fresh, value.requires_grad) if is_parameter else fresh
            held[name] = None if value is None else replaced[id(value)]
    return True


def _has_unregistered_tensors(part: torch.nn.Module) -> bool:
    """Return whether attributes of a module hold tensors that are not registered as its parameters or buffers."""
    held = [value for name, value in vars(part).items() if name not in ("_parameters", "_buffers", "_modules")]
    while held:
        value = held.pop()
        if isinstance(value, torch.Tensor):
            return True
        if isinstance(value, Mapping):
            held += value.values()
        elif isinstance(value, list | tuple | set):
            held += value
    return False


class NoInit(TorchFunctionMode):
    """Skip the initialisation of parameters, and of meta tensors, for which torch would decompose the operation.

    Operations of a forward pass are executed: a backbone reads off their graph which parameters reach its maps.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: D105
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init" or getattr(func, "__name__", "") in _FILLS:
            tensor = args[0] if args else kwargs.get("tensor")
            if isinstance(tensor, torch.nn.Parameter) or _is_unfilled(tensor):
                return tensor
        return func(*args, **kwargs)


def _is_unfilled(tensor: Any) -> bool:
    return isinstance(tensor, torch.Tensor) and tensor.is_meta and tensor.grad_fn is None
