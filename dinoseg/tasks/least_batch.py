"""How many samples at once a model can be trained on at least."""

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dinoseg.config.nodes import instantiate
from dinoseg.experiment import build
from dinoseg.inference.walk import walking
from dinoseg.utils.errors import UserError
from dinoseg.utils.wording import typed

_SMALL = 4  # patches along a crop, beyond which no map of it is a single cell


def check_batch(cfg: DictConfig, least: int, world: int) -> None:
    """Refuse less than `least` images a rank, which the head needs, and one of a single cell for BatchNorm."""
    size, larger = cfg.data.batch_size, ""
    if least * world <= size < (least + 1) * world and (needed := least_batch(cfg)) > least:
        least, larger = needed, f" at resolution.crop={typed(list(cfg.resolution.crop))}"
    if size < least * world:
        raise UserError(
            f"data.batch_size={size}: head={cfg.choices.head} is trained on {least} images or more per device{larger}. "
            f"Set data.batch_size={least * world}{', give a larger crop' if larger else ''} or choose another head."
        )


def least_batch(cfg: DictConfig) -> int:
    """Return how many samples at once a model is trained on at least: of one cell BatchNorm has no statistics.

    Raises:
        UserError: the parts of the config do not go together.
    """
    if cfg.adapter.get("bits") is not None:
        cfg = OmegaConf.merge(cfg, {"adapter": {"bits": None}})  # type: ignore[assignment]
    model = build.outline(cfg).train()
    least = model.head.least_batch
    norms = [part for part in model.modules() if isinstance(part, _BatchNorm) and part.training]
    if cfg.trainer.feed != "images" or not norms:
        return least
    instantiate(cfg.data.augment)  # refuses a crop that is no size
    if max(cfg.resolution.crop) * model.scale > _SMALL * model.patch_size:
        return least
    for norm in norms:
        norm.register_forward_pre_hook(_refuse_one_value)
    with walking():
        model.to_empty(device="cpu")
        try:
            model(torch.empty(least, 3, *cfg.resolution.crop, dtype=torch.uint8))
        except _OneValue:
            return least + 1
    return least


class _OneValue(Exception):
    """BatchNorm has one value of each channel."""


def _refuse_one_value(norm: nn.Module, given: tuple[Tensor, ...]) -> None:
    if given[0].numel() == given[0].shape[1]:
        raise _OneValue
