"""Minimum number of samples per device that a model can be trained on."""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dinoseg.experiment.builder import Builder
from dinoseg.inference.walk import walking
from dinoseg.utils.errors import UserError
from dinoseg.utils.wording import format_override

_SMALL = 4  # patches along a crop, above which its maps have several cells


def check_batch(build: Builder, least: int, world_size: int) -> None:
    """Refuse a batch of less than `least` images per rank, which the head needs, or too small for BatchNorm."""
    size, head, larger = build.value("data.batch_size"), build.options["head"], ""
    if least * world_size <= size < (least + 1) * world_size and (needed := min_batch(build)) > least:
        least, larger = needed, f" at resolution.crop={format_override(list(build.value('resolution.crop')))}"
    if size < least * world_size:
        raise UserError(
            f"data.batch_size={size}: head={head} is trained on {least} images or more per device{larger}. "
            f"Set data.batch_size={least * world_size}{', give a larger crop' if larger else ''} or choose another "
            "head."
        )


def min_batch(build: Builder) -> int:
    """Return the minimum number of samples per device for training.

    BatchNorm has no statistics of a single value per channel. If one sample has only a single cell, the minimum rises
    by one.

    Raises:
        UserError: the parts of the config do not go together.
    """
    if build.value("adapter.bits") is not None:
        build = build.changed({"adapter": {"bits": None}})
    model = build.outline().train()
    least = model.head.min_batch_size
    norms = [part for part in model.modules() if isinstance(part, _BatchNorm) and part.training]
    if model.head.slots is not None or "unlabelled" in build.value("trainer") or not norms:
        return least  # slots see several frames of a clip, and a batch also has images without masks
    build.part("data.augment")  # refuses an invalid crop
    crop = build.value("resolution.crop")
    if max(crop) * model.scale > _SMALL * model.patch_size:
        return least
    for norm in norms:
        norm.register_forward_pre_hook(_refuse_one_value)
    with walking():
        model.to_empty(device="cpu")
        try:
            model(torch.empty(least, 3, *crop, dtype=torch.uint8))
        except _OneValue:
            return least + 1
    return least


class _OneValue(Exception):
    """Raised if BatchNorm gets a single value per channel."""


def _refuse_one_value(norm: nn.Module, given: tuple[Tensor, ...]) -> None:
    if given[0].numel() == given[0].shape[1]:
        raise _OneValue
