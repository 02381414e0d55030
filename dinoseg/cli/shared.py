"""The config of a job as rank 0 shares it: names of options and plain values, like a checkpoint's.

Any process that reaches the store could write it: a rank composes the options from its own config files.
"""

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dinoseg.config.plain import to_container
from dinoseg.config.stored import VALUES_ONLY, Source, compose_stored, describe

# keys in another form, or of each rank
_NOT_SHARED = (VALUES_ONLY, "members", "choices", "config_dirs", "cache_dir", "logger", "pack", "chooser")


def describe_job(cfg: DictConfig) -> dict[str, Any]:
    """Return the description of a job's config.

    Raises:
        UserError: see `describe`.
    """
    keys = [str(key) for key in cfg if key not in _NOT_SHARED]
    held = [*cfg.get(VALUES_ONLY, ())]
    members = [describe_job(member) for member in cfg.get("members", ())]
    return {**describe(cfg, keys), "hparam": cfg.choices.hparam, VALUES_ONLY: held, "members": members}


def compose_shared(shared: Mapping[str, Any], own: Mapping[str, Any]) -> DictConfig:
    """Return the config of a job that rank 0 has described.

    Args:
        shared: as `describe_job` returns it; not trusted.
        own: the config that this rank has composed from the command line, as plain values.

    Raises:
        UserError: see `compose_stored`.
    """
    source = Source("the config of rank 0", own["config_dirs"], typed=["backbone.weights"])  # which rank 0 has checked
    choices = {**own["choices"], **shared["choices"], "hparam": shared["hparam"]}
    held = shared[VALUES_ONLY]
    composed = {**own, **compose_stored(shared, source, unused=held), "choices": choices}
    if held:
        composed[VALUES_ONLY] = held
    if shared["members"]:
        composed["members"] = [to_container(compose_shared(member, own)) for member in shared["members"]]
    return OmegaConf.create(composed)
