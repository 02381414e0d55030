"""A new run that begins with the weights of another: what both models have, the rest as it is made."""

import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import Tensor

from dinoseg.config.plain import plain
from dinoseg.errors import UserError
from dinoseg.model import Segmenter, trained_names
from dinoseg.training import checkpoint
from dinoseg.training.loading import Checkpoint, casts, frozen_fingerprint
from dinoseg.wording import count_of, listed, shown

logger = logging.getLogger(__name__)


def begin_with(cfg: DictConfig, model: Segmenter, classes: list[str]) -> Segmenter:
    """Return the model of a new run with the trained weights of the run that `init` names, where they fit, and say so.

    A run that goes on has its own, and is returned as it is.

    Args:
        cfg: the whole config.
        model: as it was made, on the CPU.
        classes: of the data.

    Raises:
        UserError: there is no such run, nothing of it fits, or what it learnt of the backbone would be left out.
    """
    if not has_initial(cfg):
        return model
    saved = _of(cfg, partial(checkpoint.read, finite=cfg.finite_weights))
    taken = _fitting(cfg, model, saved)
    _check_frozen(cfg, model, saved)
    model.load_state_dict(taken, strict=False)
    _tell(cfg, model, saved, taken, classes)
    return model


def has_initial(cfg: DictConfig) -> bool:
    """Return whether a run is a new one that begins with another's weights."""
    return cfg.init is not None and cfg.resume is None


def check_initial(cfg: DictConfig, model: Segmenter) -> None:
    """Refuse what `begin_with` would, as far as names and shapes tell; the model may be on the meta device."""
    if has_initial(cfg):
        _fitting(cfg, model, _of(cfg, checkpoint.outline))


def _of(cfg: DictConfig, read: Callable[[Path], Checkpoint]) -> Checkpoint:
    given = cfg.init
    if not isinstance(given, str):
        raise UserError(f"init={given} names no run. Give a run folder or a checkpoint, or leave init out.")
    try:
        return read(checkpoint.find(given, "best"))
    except UserError as error:
        raise UserError(str(error).replace("resume=", "init=")) from None


def _fitting(cfg: DictConfig, model: Segmenter, saved: Checkpoint) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint that training changes in the model, too, and that have its shapes."""
    state, have = model.state_dict(), saved.part("model")
    own = trained_names(model)
    taken = {
        name: value
        for name, value in have.items()
        if name in own and value.shape == state[name].shape and casts(value.dtype, state[name].dtype)
    }
    lost = [
        name
        for name, value in have.items()
        if name.startswith("backbone.") and name not in taken and not _is_so(value, state.get(name))
    ]
    if lost:
        raise UserError(
            f"init={cfg.init}: it has trained {count_of(len(lost), 'tensor')} of its backbone (such as "
            f"{shown(lost[0])}) that this model does not train, or has otherwise: its head knows no other features. "
            f"Choose its backbone and adapter={shown(str(saved.info['choices']['adapter']))}, with that one's values."
        )
    if not any(name.startswith("head.") for name in taken):
        raise UserError(
            f"init={cfg.init}: of the {count_of(len(have), 'tensor')} it has, none is of this model's head. Use "
            "the head and the backbone that it was trained with (they are in its config), or leave init out."
        )
    return taken


def _is_so(value: Tensor, now: Tensor | None) -> bool:
    """Return whether a model has these numbers in any case, as of a file that holds what is frozen, too."""
    if now is None or value.shape != now.shape:
        return False
    return value.is_meta or torch.equal(value.to(now.dtype), now)


def _check_frozen(cfg: DictConfig, model: Segmenter, saved: Checkpoint) -> None:
    """Refuse other frozen weights of the backbone, where both runs freeze the same part of it."""
    own = trained_names(model)
    if any(name.startswith("backbone.") and name not in own for name in saved.part("model")):
        return  # the file holds the frozen part, whose numbers are those of the model, see `_fitting`
    if plain(cfg.adapter) != saved.info["config"]["adapter"]:
        return  # names and shares of what is frozen differ, and a checkpoint holds no more than a hash of them
    if frozen_fingerprint(model)["backbone"] != saved.info["frozen"].get("backbone"):
        raise UserError(
            f"init={cfg.init}: trained on other frozen backbone weights than backbone.weights gives now. Give what "
            "it was trained on."
        )


def _tell(
    cfg: DictConfig, model: Segmenter, saved: Checkpoint, taken: Mapping[str, Tensor], classes: list[str]
) -> None:
    new = sorted(trained_names(model) - taken.keys())
    left = sorted(saved.part("model").keys() - taken.keys())
    said = [f"init={cfg.init}: {count_of(len(taken), 'tensor')} taken from step {saved.info['progress']['step']}"]
    said += [f"begins anew: {listed(new, 5)}"] if new else []
    said += [f"left there: {listed(left, 5)}"] if left else []
    logger.info("%s.", "; ".join(said))
    theirs = list(map(str, saved.info["classes"]))
    if theirs != classes and len(theirs) == len(classes):
        logger.warning("init: its classes are %s, and those of the data begin as these.", listed(theirs, 20))
