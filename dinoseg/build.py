"""Config to objects: the only caller of hydra's instantiate, and the guard for configs that come from files."""

import importlib
import inspect
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

import torch
from hydra.errors import InstantiationException
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

TRUSTED = ("dinoseg", "torch.nn", "torch.optim")  # packages in which targets are looked up
LEAVES = tuple(f"dinoseg.{room}" for room in ("adapters", "backbones", "data", "heads", "losses", "training"))
NAMEABLE = (*LEAVES, "torch.nn", "torch.optim")  # what a config from a file may name: nothing that instantiates in turn
SPLITS = ("train", "val", "test")
LIST = (list, tuple)
PLAIN: dict[Any, Any] = {  # what an annotated parameter takes from a config
    **{int: int, float: (int, float), str: str, bool: bool, NoneType: NoneType},
    **{Sequence: LIST, Iterable: LIST, Mapping: Mapping},
}


def instantiate(node: Any) -> Any:
    """Return what a config node describes; a `_partial_` node gives a callable that waits for the rest.

    Raises:
        UserError: a value is missing, or a key or its value is not one that the target takes.
    """
    try:
        plain = OmegaConf.to_container(node, resolve=True, throw_on_missing=True) if OmegaConf.is_config(node) else node
    except OmegaConfBaseException as error:
        raise UserError(_missing(error)) from None
    for target, given in _targets(plain):
        _check_given(target, given)
    try:
        return hydra_instantiate(plain, _convert_="all")
    except InstantiationException as error:
        raise (error.__cause__ or error) from None  # what the target itself raised, not hydra's wrapping


def model(cfg: DictConfig, weights: str | None = None) -> Segmenter:
    """Return the segmenter of a config; `weights` replaces `backbone.weights`."""
    if not isinstance(cfg.seed, int) or cfg.seed < 0:
        raise UserError(f"seed={cfg.seed}: give a whole number that is not negative.")
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

    Each `_target_` is looked up step by step below `NAMEABLE`, and the object found must itself be a class or
    function defined there: `dinoseg.data.loader.torch.hub.load` starts rightly and ends elsewhere. Interpolations
    may only point inside the config.

    Raises:
        UserError: naming the target or the interpolation.
    """
    plain = OmegaConf.to_container(node, resolve=False) if OmegaConf.is_config(node) else node
    for target, _ in _targets(plain):
        found = _locate(target) if _below(target, NAMEABLE) else None
        module_name = getattr(found, "__module__", None) or ""
        if not (inspect.isclass(found) or inspect.isfunction(found)) or not _below(module_name, NAMEABLE):
            raise UserError(
                f"{where}: _target_={target} is refused. A config from a checkpoint may only name classes and "
                f"functions of {', '.join(NAMEABLE)}. Do not use this file, or rebuild the run from your own config."
            )
    for text in _strings(plain):
        if "${" in text and ":" in text.replace("${len:", ""):
            raise UserError(
                f"{where}: the interpolation {text} is refused. A config from a checkpoint may only point within it."
            )


def _below(path: str, roots: Iterable[str]) -> bool:
    return any(path == root or path.startswith(f"{root}.") for root in roots)


def _locate(path: str) -> Any:
    """Return the object of a dotted path, importing only below the trusted packages."""
    parts = path.split(".")
    found: Any = importlib.import_module(parts[0])
    for end, part in enumerate(parts[1:], start=2):
        if not hasattr(found, part) and inspect.ismodule(found) and _below(found.__name__, TRUSTED):
            try:
                importlib.import_module(".".join(parts[:end]))
            except ImportError:
                return None
        found = getattr(found, part, None)
    return found


def _targets(node: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every `_target_` below a plain node with the keys and values beside it."""
    if isinstance(node, Mapping):
        if isinstance(node.get("_target_"), str):
            yield node["_target_"], {key: value for key, value in node.items() if not str(key).startswith("_")}
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


def _check_given(target: str, given: Mapping[str, Any]) -> None:
    found = _locate(target) if _below(target, TRUSTED) else None
    if found is None:
        return
    parameters = inspect.signature(found).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    unknown = [key for key in given if key not in parameters]
    if unknown and not takes_any:
        raise UserError(
            f"{target} does not take {', '.join(unknown)}. It takes: {', '.join(name for name in parameters)}. "
            f"Check the key's spelling."
        )
    for key, value in given.items():
        if key in parameters and not _fits(value, parameters[key].annotation):
            wanted = inspect.formatannotation(parameters[key].annotation).replace("collections.abc.", "")
            raise UserError(
                f"{key}={value} is of type {type(value).__name__}, but {target} takes {wanted}. Correct the value."
            )


def _fits(value: Any, annotation: Any) -> bool:
    """Return whether a value from a config can be what an annotation says; one not in `PLAIN` allows everything."""
    if isinstance(value, Mapping) and "_target_" in value:
        return True
    kind = get_origin(annotation) or annotation
    if kind in (Union, UnionType):
        return any(_fits(value, part) for part in get_args(annotation))
    if isinstance(value, bool) and kind in (int, float):
        return False
    return isinstance(value, PLAIN.get(kind, object))


def _missing(error: OmegaConfBaseException) -> str:
    absent = re.search(r"Missing mandatory value: (\S+)", str(error))
    if absent:
        return f"{absent[1]} is not set. Give it on the command line: {absent[1]}=VALUE."
    key = getattr(error, "full_key", None) or "The config"
    return f"{key} cannot be resolved: {str(error).strip().splitlines()[0]}."
