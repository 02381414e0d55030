"""Builders of losses from the config, with or without class weights."""

import torch
from omegaconf import DictConfig
from torch import Tensor

from dinoseg.config.nodes import instantiate, keeping
from dinoseg.core.contracts import Loss
from dinoseg.core.shapes import SegmentationData
from dinoseg.utils.errors import UserError


def criterion(cfg: DictConfig, **weights: Tensor) -> Loss:
    """Return the loss of a config; a loss on labels also takes `class_weights`."""
    return keeping(Loss, instantiate(cfg.loss.criterion)(**weights), "loss.criterion")


def unweighted(cfg: DictConfig) -> Loss:
    """Return the loss of a config with equal class weights, without counting labels."""
    weighs = cfg.loss.class_weights is not None
    return criterion(cfg, **({"class_weights": torch.ones(len(cfg.data.classes))} if weighs else {}))


def loss(cfg: DictConfig, train: SegmentationData | None) -> Loss:
    """Return the loss of a config, with class weights from the pixels of the training masks.

    `train` may be None for losses that need no masks.
    """
    if cfg.loss.class_weights is None:
        if cfg.loss.weights != "none":
            raise UserError(f"loss.weights={cfg.loss.weights}: loss={cfg.choices.loss} knows no classes. Leave it out.")
        return criterion(cfg)
    if train is None:
        raise UserError(
            f"loss={cfg.choices.loss} is a loss on labels, which clips have none of. Choose "
            "loss=feature_reconstruction or loss=video_similarity, or trainer=supervised for images and masks."
        )
    weigh = instantiate(cfg.loss.class_weights)
    counted = isinstance(cfg.loss.weights, str) and cfg.loss.weights != "none"
    counts = instantiate(cfg.loss.counts)(train) if counted else [1] * len(train.classes)
    return criterion(cfg, class_weights=weigh(counts, train.classes))
