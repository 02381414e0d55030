"""Config to objects: the only caller of hydra's instantiate, and the guard for configs that come from files."""

import importlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from hydra.utils import instantiate as hydra_instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn
from torch.optim import Optimizer

from dinoseg.config import plain
from dinoseg.errors import UserError
from dinoseg.model import Segmenter
from dinoseg.shapes import SegmentationData
from dinoseg.training.engine import Engine
from dinoseg.training.feed import Feed

TRUSTED = ("dinoseg", "torch.nn", "torch.optim")
SPLITS = ("train", "val", "test")


def instantiate(node: Any) -> Any:
    """Return what a config node describes; a `_partial_` node gives a callable that waits for the rest.

    Raises:
        UserError: a value is missing, or a key is not one that the target takes.
    """
    try:
        plain = OmegaConf.to_container(node, resolve=True, throw_on_missing=True) if OmegaConf.is_config(node) else node
    except OmegaConfBaseException as error:
        raise UserError(_missing(error)) from None
    for target, keys in _targets(plain):
        _check_keys(target, keys)
    return hydra_instantiate(plain, _convert_="all")


def model(cfg: DictConfig, weights: str | None = None) -> Segmenter:
    """Return the segmenter of a config; `weights` replaces `backbone.weights`."""
    torch.manual_seed(cfg.seed)
    backbone_node = cfg.backbone if weights is None else {**plain(cfg.backbone, resolve=True), "weights": weights}
    backbone = instantiate(backbone_node)
    backbone = instantiate(cfg.adapter)(backbone)
    head = instantiate(cfg.head)(in_dim=backbone.dim, num_layers=backbone.num_layers)
    return Segmenter(backbone, head, scale=cfg.resolution.scale, longest=cfg.resolution.longest)


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
    return Feed(
        train=dataset(cfg, "train"),
        val=dataset(cfg, "val"),
        augment=instantiate(cfg.data.augment),
        batch_size=cfg.data.batch_size,
        seed=cfg.seed,
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


def guard(node: Any, where: str = "config") -> None:
    """Refuse a config read from a file that names anything but the parts it may name.

    Each `_target_` is looked up step by step below a trusted package, and the object found must itself be a class
    or function defined in one: `dinoseg.model.torch.hub.load` starts rightly and ends elsewhere. Interpolations may
    only point inside the config.

    Raises:
        UserError: naming the target or the interpolation.
    """
    plain = OmegaConf.to_container(node, resolve=False) if OmegaConf.is_config(node) else node
    for target, _ in _targets(plain):
        found = _locate(target) if _trusted(target) else None
        module_name = getattr(found, "__module__", None) or ""
        if not (inspect.isclass(found) or inspect.isfunction(found)) or not _trusted(module_name):
            raise UserError(
                f"{where}: _target_={target} is refused. A config from a checkpoint may only name classes "
                f"and functions of {', '.join(TRUSTED)}. Do not use this file, or rebuild the run from your own config."
            )
    for text in _strings(plain):
        if "${" in text and ":" in text.replace("${len:", ""):
            raise UserError(
                f"{where}: the interpolation {text} is refused. A config from a checkpoint may only point within it."
            )


def _trusted(path: str) -> bool:
    return any(path == root or path.startswith(f"{root}.") for root in TRUSTED)


def _locate(path: str) -> Any:
    """Return the object of a dotted path, importing only below the trusted packages."""
    parts = path.split(".")
    found: Any = importlib.import_module(parts[0])
    for end, part in enumerate(parts[1:], start=2):
        if not hasattr(found, part) and inspect.ismodule(found) and _trusted(found.__name__):
            try:
                importlib.import_module(".".join(parts[:end]))
            except ImportError:
                return None
        found = getattr(found, part, None)
    return found


def _targets(node: Any) -> Iterator[tuple[str, list[str]]]:
    """Yield every `_target_` below a plain node with the keys beside it."""
    if isinstance(node, Mapping):
        if isinstance(node.get("_target_"), str):
            yield node["_target_"], [key for key in node if not str(key).startswith("_")]
        for value in node.values():
            yield from _targets(value)
    elif isinstance(node, list | tuple):
        for value in node:
            yield from _targets(value)


def _strings(node: Any) -> Iterator[str]:
    if isinstance(node, Mapping):
        for value in node.values():
            yield from _strings(value)
    elif isinstance(node, list | tuple):
        for value in node:
            yield from _strings(value)
    elif isinstance(node, str):
        yield node


def _check_keys(target: str, keys: list[str]) -> None:
    found = _locate(target) if _trusted(target) else None
    if found is None:
        return
    parameters = inspect.signature(found).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    unknown = [key for key in keys if key not in parameters]
    if unknown and not takes_any:
        raise UserError(
            f"{target} does not take {', '.join(unknown)}. It takes: {', '.join(name for name in parameters)}. "
            f"Check the key's spelling."
        )


def _missing(error: OmegaConfBaseException) -> str:
    key = getattr(error, "full_key", None)
    reason = str(error).strip().splitlines()[0]
    return f"{key or 'The config'} is not set ({reason}). Give it on the command line: {key or 'KEY'}=VALUE."
