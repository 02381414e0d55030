"""Config to objects: the only caller of hydra's instantiate."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate as hydra_instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn
from torch.optim import Optimizer

from dinoseg.checks import check_given, targets
from dinoseg.config import plain
from dinoseg.errors import UserError
from dinoseg.model import Segmenter
from dinoseg.shapes import SegmentationData
from dinoseg.training.engine import Engine
from dinoseg.training.feed import Feed

SPLITS = ("train", "val", "test")


def instantiate(node: Any, *, without: Sequence[str] = ()) -> Any:
    """Return what a config node describes; a `_partial_` node gives a callable that waits for the rest.

    Args:
        node: a config node or a dict, with `_target_`.
        without: keys beside it that are for somebody else.

    Raises:
        UserError: a value is missing, or a key or its value is not one that the target takes.
    """
    try:
        values: Any = (
            OmegaConf.to_container(node, resolve=True, throw_on_missing=True) if OmegaConf.is_config(node) else node
        )
    except OmegaConfBaseException as error:
        raise UserError(_missing(error)) from None
    values = {key: value for key, value in values.items() if key not in without}
    for target, given in targets(values):
        check_given(target, given)
    try:
        return hydra_instantiate(values, _convert_="all")
    except InstantiationException as error:
        raise (error.__cause__ or error) from None  # what the target itself raised, not hydra's wrapping


def model(cfg: DictConfig, weights: str | None = None) -> Segmenter:
    """Return the segmenter of a config; `weights` replaces `backbone.weights`."""
    torch.manual_seed(_seed(cfg))
    backbone_node = cfg.backbone if weights is None else {**plain(cfg.backbone, resolve=True), "weights": weights}
    backbone = instantiate(backbone_node)
    backbone = instantiate(cfg.adapter)(backbone)
    head = instantiate(cfg.head)(in_dim=backbone.dim, num_layers=backbone.num_layers)
    resolution = {"scale": cfg.resolution.scale, "longest": cfg.resolution.longest}
    check_given("dinoseg.model.Segmenter", resolution)
    return Segmenter(backbone, head, **resolution)


def dataset(cfg: DictConfig, split: str) -> SegmentationData:
    """Return one split of a config's data set.

    Raises:
        UserError: an unknown split, or whatever the data set finds wrong.
    """
    if split not in SPLITS:
        raise UserError(f"split={split} is unknown. Choose one of {', '.join(SPLITS)}.")
    return instantiate(cfg.data.source)(split=split)


def feed(cfg: DictConfig, engine: Engine) -> Feed:
    """Return the batches of a config for one rank."""
    check_given("dinoseg.training.feed.Feed", {"batch_size": cfg.data.batch_size})
    return Feed(
        train=dataset(cfg, "train"),
        val=dataset(cfg, "val"),
        augment=instantiate(cfg.data.augment),
        batch_size=cfg.data.batch_size,
        seed=_seed(cfg),
        workers=engine.workers,
        rank=engine.rank,
        world=engine.world,
    )


def loss(cfg: DictConfig, train: SegmentationData) -> nn.Module:
    """Return the loss of a config, its class weights from the pixels of the training masks."""
    weigh = instantiate(cfg.loss.class_weights)
    counts = instantiate(cfg.loss.counts)(train) if cfg.loss.weights != "none" else [1] * len(train.classes)
    return instantiate(cfg.loss.criterion)(class_weights=weigh(counts))


def optimizer(cfg: DictConfig, module: nn.Module) -> Optimizer:
    """Return the optimizer of a config over a model's trainable parameters."""
    return instantiate(cfg.optim.optimizer)(module)


def _seed(cfg: DictConfig) -> int:
    if not isinstance(cfg.seed, int) or cfg.seed < 0:
        raise UserError(f"seed={cfg.seed}: give a whole number that is not negative.")
    return cfg.seed


def _missing(error: OmegaConfBaseException) -> str:
    absent = re.search(r"Missing mandatory value: (\S+)", str(error))
    if absent:
        return f"{absent[1]} is not set. Give it on the command line: {absent[1]}=VALUE."
    key = getattr(error, "full_key", None) or "The config"
    return f"{key} cannot be resolved: {str(error).strip().splitlines()[0]}."
