"""Inference with torch: a predictor with numpy results, and isolation from the surrounding program."""

from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from dinoseg.core.objects import Objects
from dinoseg.core.task import ObjectTask
from dinoseg.inference.predictor import Predictor
from dinoseg.utils.errors import UserError
from dinoseg.utils.torch_defaults import default_precision_and_device, default_settings

T = TypeVar("T", bound=nn.Module)
_CONTAINERS = (list, tuple, dict, OrderedDict)  # of references to modules; hooks are in an OrderedDict


class TorchRuntime:
    """The `Runtime` of torch: a predictor with numpy results.

    Args:
        predictor: its model is in eval mode, and stays so.
    """

    name = "torch"

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor

    @property
    def task(self) -> str:
        """`semantic`, `instance` or `panoptic`; `multilabel`: masks have a layer for each class."""
        task = self.predictor.model.task
        if isinstance(task, ObjectTask):
            return "instance" if task.overlap else "panoptic"
        return "multilabel" if task.has_layers else "semantic"

    @property
    def things(self) -> Collection[int]:
        """Ids of the classes that have objects; empty if the model predicts no objects."""
        task = self.predictor.model.task
        return task.things if isinstance(task, ObjectTask) else ()

    def ids(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Return the class ids (B, H, W) uint8 of images (H, W, 3) uint8 RGB of one size; of layers, (B, K, H, W)."""
        with default_precision_and_device():
            return self.predictor.ids(images)

    def predict(self, images: Sequence[np.ndarray]) -> Sequence[tuple[np.ndarray, Objects | None]]:
        """Return for each image what `ids` does, and its objects from the same passes; None without objects."""
        with default_precision_and_device():
            return [(found.ids, found.objects) for found in self.predictor.predict(images)]

    def probabilities(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Return the class probabilities (B, K, H, W) float32 of images (H, W, 3) uint8 RGB of one size."""
        with default_precision_and_device():
            return self.predictor.probabilities(images).cpu().numpy()


def replicate_in_eval_mode(model: T) -> T:
    """Return a model in eval mode with the parameters and buffers of `model`, whose own mode does not change.

    A module has one mode for all threads. A prediction that switched it would change the forward passes of a training
    loop in another thread. The replica has other module objects, and the same tensors, hooks and attributes. Where an
    attribute refers to a module, in a bound method or a container too, the replica's refers to the replica.

    Raises:
        UserError: a module of TorchScript, which cannot be replicated, is in training mode.
    """
    replicas: dict[int, Any] = {}  # of modules, and of containers with modules, by the identity of the original
    parts = [part for part in model.modules() if not isinstance(part, torch.jit.ScriptModule)]
    scripted = [part for part in model.modules() if isinstance(part, torch.jit.ScriptModule)]
    if any(part.training for part in scripted):
        raise UserError("The model holds a TorchScript module in training mode. Call model.eval() before predict.")
    for part in parts:
        plain: Any = part._modules.get("_orig_mod", part)  # a module of `torch.compile` always calls the original
        if id(plain) not in replicas:
            # not the class's own `__new__`: that of torch.fx makes a class without a forward pass
            replicas[id(plain)] = object.__new__(type(plain))
        replicas[id(part)] = replicas[id(plain)]
    for part in parts:
        if "_orig_mod" not in part._modules:
            # a copy, since another thread may set an attribute in its forward pass
            state = {name: _replace_modules(value, replicas) for name, value in vars(part).copy().items()}
            # what `module.compile()` sets also calls the original
            vars(replicas[id(part)]).update(state, training=False, _compiled_call_impl=None)
    return replicas[id(model)]


def _replace_modules(value: Any, replicas: dict[int, Any]) -> Any:
    """Return an attribute of the replica, which is the original's if that refers to no module."""
    if isinstance(value, nn.Module):
        return replicas.get(id(value), value)
    if isinstance(value, MethodType):
        return MethodType(value.__func__, _replace_modules(value.__self__, replicas))
    if isinstance(value, partial):
        function = _replace_modules(value.func, replicas)
        args = _replace_modules(value.args, replicas)
        return partial(function, *args, **_replace_modules(value.keywords, replicas))
    if type(value) not in _CONTAINERS or not value:
        return value
    if id(value) not in replicas:
        replicas[id(value)] = value  # it may contain itself
        old = list(value.copy().items() if isinstance(value, dict) else enumerate(value))
        new = {key: _replace_modules(each, replicas) for key, each in old}
        if any(new[key] is not each for key, each in old):
            replicas[id(value)] = type(value)(new if isinstance(value, dict) else new.values())
    return replicas[id(value)]


@contextmanager
def preserve_global_state() -> Iterator[None]:
    """Restore torch's random state and settings after the block, which has default settings."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices), default_settings():
        yield
