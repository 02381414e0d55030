"""Config to models, data, losses and optimizers."""

from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn
from torch.optim import Optimizer

from dinoseg.checks import check_given
from dinoseg.config import plain
from dinoseg.errors import UserError
from dinoseg.model import Segmenter
from dinoseg.nodes import instantiate, not_set
from dinoseg.shapes import SegmentationData
from dinoseg.tensor_files import check_file
from dinoseg.training.engine import Engine
from dinoseg.training.feed import Feed

SPLITS = ("train", "val", "test")


def model(cfg: DictConfig, *, untrained: bool = False) -> Segmenter:
    """Return the segmenter of a config; `untrained` reads no weights.

    What does not fit together is refused before any weights are read.
    """
    if not untrained:
        _check_head_file(cfg)
    if not untrained and cfg.backbone.get("weights") != "random":
        with torch.device("meta"):
            model(cfg, untrained=True)
    adapter = instantiate(cfg.adapter)
    torch.manual_seed(_seed(cfg))
    backbone = adapter(instantiate(cfg.backbone, instead={"weights": "random"} if untrained else None))
    keys = plain(cfg.head)
    late = {"in_dim": backbone.dim, "num_layers": backbone.num_layers}
    if "patch_size" in keys and cfg.head.patch_size is None:  # of a timm model, which alone knows it
        late["patch_size"] = backbone.patch_size
    weightless = {"weights": None} if untrained and "weights" in keys else None
    head = instantiate(cfg.head, without=("layers", *late), instead=weightless)(**late)
    resolution = {"scale": cfg.resolution.scale, "longest": cfg.resolution.longest}
    check_given("dinoseg.model.Segmenter", resolution)
    return Segmenter(backbone, head, **resolution)


def _check_head_file(cfg: DictConfig) -> None:
    """Refuse a head's file that is not given or not there, before the backbone's are fetched."""
    weights = plain(cfg.head).get("weights")
    if weights == "???":
        raise UserError(not_set("head.weights"))
    if weights is not None:
        check_file(Path(str(weights)).expanduser(), "head.weights")


def dataset(cfg: DictConfig, split: str, *, reduced: bool = False) -> SegmentationData:
    """Return one split of a config's data set.

    Args:
        cfg: the whole config.
        split: train, val or test.
        reduced: to train on: a packed image need not be larger than the model sees it.

    Raises:
        UserError: an unknown split, or whatever the data set finds wrong.
    """
    found = instantiate(cfg.data.reader)(split=_known(split))
    return instantiate(cfg.data.opened)(found, split=split, reduced=reduced)


def clips(cfg: DictConfig, split: str) -> Any:
    """Return one split of a config's videos as clips of frames (`dinoseg.data.clips.Clips`).

    Raises:
        UserError: an unknown split, data that is no video, or whatever the data set finds wrong.
    """
    if cfg.data.clips is None:
        raise UserError(
            f"data={cfg.choices.data} has no clips. Choose data=davis2016, davis2017, youtube_vos, movi or videos."
        )
    return instantiate(cfg.data.clips)(split=_known(split))


def feed(cfg: DictConfig, engine: Engine) -> Feed:
    """Return the batches of a config for one rank."""
    check_given("dinoseg.training.feed.Feed", {"batch_size": cfg.data.batch_size})
    return Feed(
        train=dataset(cfg, "train", reduced=True),
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


def _known(split: str) -> str:
    if split not in SPLITS:
        raise UserError(f"split={split} is unknown. Choose one of {', '.join(SPLITS)}.")
    return split
