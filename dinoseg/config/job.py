"""The config of a job: composed by Hydra, with the option of each group added and short forms expanded."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dinoseg.config.grammar import decode_keys
from dinoseg.config.options import chosen_options, options_of
from dinoseg.config.plain import to_container
from dinoseg.utils.errors import UserError

_FILES = ("main", "engine/auto")
_SHIPPED = Path(__file__).parents[1] / "cfg"


def job_config(cfg: DictConfig, options: Mapping[str, Any]) -> DictConfig:
    """Return the whole config of a job: as composed by Hydra, with `choices`, the option of each group.

    Args:
        cfg: composed by Hydra.
        options: Hydra's choices.
    """
    job = {key: value for key, value in to_container(squared(cfg)).items() if key != "hydra"}
    return OmegaConf.create({**decode_keys(job), "choices": chosen_options(options)})


def machine_config(inference: str) -> DictConfig:
    """Return the machine and inference parts of a job's config, from the shipped files and without Hydra.

    Args:
        inference: option of the group inference.

    Raises:
        UserError: the option does not exist.
    """
    options = options_of(_SHIPPED / "inference")
    if inference not in options:
        raise UserError(f"inference={inference} is unknown. Choose one of {', '.join(options)}.")
    root, engine, use = (OmegaConf.load(_SHIPPED / f"{name}.yaml") for name in _FILES + (f"inference/{inference}",))
    job = {key: value for key, value in to_container(root).items() if key != "defaults"}
    return OmegaConf.create({**job, "engine": engine, "inference": use, "choices": {"inference": inference}})


def squared(cfg: DictConfig) -> DictConfig:
    """Return `cfg` with a crop given as one number n expanded to [n, n]."""
    crop = OmegaConf.select(cfg, "resolution.crop")
    return OmegaConf.merge(cfg, {"resolution": {"crop": [crop, crop]}}) if type(crop) is int else cfg  # type: ignore[return-value]
