"""The config of a job as rank 0 shares it: names of options and plain values, like a checkpoint's.

Whoever reaches the store of the ranks could have written it: a rank composes the options from its own config files.
"""

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dinoseg.config.plain import to_container
from dinoseg.config.stored import Source, compose_stored, describe, update_job
from dinoseg.experiment.heads import SOLO
from dinoseg.experiment.recipe import SAVED

_OF_A_RANK = (SOLO, "choices", "config_dirs")  # keys of a job's config that are shared in another form, or not at all
_WHERE = "the config of rank 0"


def describe_job(cfg: DictConfig) -> dict[str, Any]:
    """Return the description of a job's config, and of the configs of each head's own run.

    Raises:
        UserError: see `describe`.
    """
    saved = [key for key in SAVED if cfg.get(key) is not None]
    return {
        "saved": describe(cfg, saved),
        "choices": to_container(cfg.choices),
        "rest": {key: value for key, value in to_container(cfg).items() if key not in (*saved, *_OF_A_RANK)},
        "solo": {name: describe_job(OmegaConf.create(solo)) for name, solo in cfg.get(SOLO, {}).items()},
    }


def compose_job(shared: Mapping[str, Any], cfg: DictConfig) -> DictConfig:
    """Return the config of a job that rank 0 has described.

    Args:
        shared: as `describe_job` returns it; not trusted.
        cfg: the config that this rank has composed from the command line, whose other options are used.

    Raises:
        UserError: see `compose_stored`.
    """
    own = to_container(cfg)
    source = Source(_WHERE, own["config_dirs"], typed=["backbone.weights"])  # rank 0 has checked the weights
    saved = compose_stored({**shared["saved"], "choices": shared["choices"]}, source)
    rest = update_job({key: own[key] for key in shared["rest"] if key in own}, shared["rest"], _WHERE)
    solo = {name: to_container(compose_job(each, cfg)) for name, each in shared["solo"].items()}
    more = {"choices": shared["choices"], "config_dirs": own["config_dirs"], **({SOLO: solo} if solo else {})}
    return OmegaConf.create({**rest, **saved, **more})
