"""Objects that a Python call gives instead of options: what the options `_object` of their groups build."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from dinoseg.core.shapes import SegmentationData
from dinoseg.utils.errors import UserError

OPTION = "_object"
# of the calls in progress in this thread, by group and split; a checkpoint names the option only
_OBJECTS: ContextVar[Mapping[str, Any]] = ContextVar("_OBJECTS", default={})  # noqa: B039 (never changed)


@contextmanager
def lend_objects(objects: Mapping[str, Any]) -> Iterator[None]:
    """Let configs with the options `_object` build these objects within the block.

    Args:
        objects: modules as `backbone`, `head` and `loss`, datasets as `data.train`, `data.val` and `data.test`.
    """
    token = _OBJECTS.set({**_OBJECTS.get(), **objects})
    try:
        yield
    finally:
        _OBJECTS.reset(token)


def take_module(group: str, **_: Any) -> nn.Module:
    """Return the module that the call gave for a group, or on the meta device a copy; its sizes are its own.

    Raises:
        UserError: the call, or this process, has none.
    """
    module = _take(group, f"{group}=MODULE")
    on_meta = torch.get_default_device().type == "meta"
    return copy.deepcopy(module).to("meta") if on_meta else module


def take_loss(class_weights: Tensor) -> nn.Module:
    """Return the loss that the call gave.

    Raises:
        UserError: the call has none, or classes are weighted.
    """
    if not class_weights.is_meta and (class_weights != 1).any():
        raise UserError("loss.weights has no effect on a loss that is an object. Leave it out; weight classes inside.")
    return take_module("loss")


def take_dataset(split: str) -> SegmentationData:
    """Return the dataset that the call gave for a split.

    Raises:
        UserError: the call, or this process, has none.
    """
    return _take(f"data.{split}", f'data={{"{split}": DATASET}}')


def _take(name: str, argument: str) -> Any:
    objects = _OBJECTS.get()
    if name not in objects:
        raise UserError(
            f"{name.partition('.')[0]}={OPTION} is an object of a Python call, and this call or process lacks "
            f"{argument}. Give it; or make it an option (docs/extending.md), for files, several devices and other "
            "commands. To save the weights alone: torch.save(model.state_dict(), PATH)."
        )
    return objects[name]
