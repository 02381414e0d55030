"""The config of a job: composed by Hydra, with the option of each group added and short forms expanded."""

from importlib.resources import files
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dinoseg.config.composition import SHIPPED
from dinoseg.config.grammar import decode_keys
from dinoseg.config.options import chosen_options
from dinoseg.config.plain import to_container


def job_config(cfg: DictConfig, runtime: Any) -> DictConfig:
    """Return the whole config of a job.

    It is the one composed by Hydra, with two further keys: `choices`, the option of each group, and `config_dirs`, the
    folders of config groups beside the shipped one.

    Args:
        cfg: composed by Hydra.
        runtime: Hydra's `hydra.runtime` of the job, with its choices and its sources of configs.
    """
    job = {key: value for key, value in to_container(squared(cfg)).items() if key != "hydra"}
    folders = [_folder(source["schema"], source["path"]) for source in runtime["config_sources"]]
    own = [folder for folder in folders if folder not in (None, str(SHIPPED))]
    return OmegaConf.create({**decode_keys(job), "choices": chosen_options(runtime["choices"]), "config_dirs": own})


def _folder(schema: str, path: str) -> str | None:
    """Return the folder of a source in Hydra's search path; None if it is no folder, or Hydra's own."""
    if schema == "file":
        return path
    return str(files(path.replace("/", "."))) if schema == "pkg" and not path.startswith("hydra") else None


def squared(cfg: DictConfig) -> DictConfig:
    """Return `cfg` with a crop given as one number n expanded to [n, n]."""
    crop = OmegaConf.select(cfg, "resolution.crop")
    return OmegaConf.merge(cfg, {"resolution": {"crop": [crop, crop]}}) if type(crop) is int else cfg  # type: ignore[return-value]
