"""The config of a job: composed by Hydra, with the option of each group added and short forms expanded."""

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from dinoseg.config.composition import SHIPPED
from dinoseg.config.grammar import decode_keys
from dinoseg.config.options import list_groups
from dinoseg.config.plain import to_container

SEARCH_PATH = "hydra.searchpath"


def job_config(cfg: DictConfig, hydra: Any) -> DictConfig:
    """Return the whole config of a job.

    It is the one composed by Hydra, with two further keys: `choices`, the option of each group, and `config_dirs`, the
    folders of config groups beside the shipped one.

    Args:
        cfg: composed by Hydra.
        hydra: Hydra's own config of the job, with its choices, its sources of configs and the overrides.
    """
    typed = OverridesParser.create().parse_overrides(to_container(hydra.overrides)["task"])
    job = {key: value for key, value in to_container(cfg).items() if key != "hydra"}
    folders = [_folder(source["schema"], source["path"]) for source in hydra.runtime["config_sources"]]
    own = [folder for folder in folders if folder not in (None, str(SHIPPED))]
    # Hydra does not record lists of options; each file of these groups has a key of its own name
    listed = {group: [*(job.get(group) or ())] for group in list_groups([SHIPPED, *map(Path, filter(None, own))])}
    chosen = {group: option for group, option in hydra.runtime["choices"].items() if not group.startswith("hydra/")}
    choices = {**chosen, **listed}
    whole = {**decode_keys(job), "choices": choices, "config_dirs": own}
    return expand_typed(OmegaConf.create(whole), typed)


def _folder(schema: str, path: str) -> str | None:
    """Return the folder of a source in Hydra's search path; None if it is no folder, or Hydra's own."""
    if schema == "file":
        return path
    return str(files(path.replace("/", "."))) if schema == "pkg" and not path.startswith("hydra") else None


def expand_typed(cfg: DictConfig, typed: Sequence[Override]) -> DictConfig:
    """Return `cfg` with a crop n as [n, n], and without the epochs of a recipe or checkpoint if steps are typed."""
    changes: dict[str, Any] = {}
    crop = OmegaConf.select(cfg, "resolution.crop")
    if type(crop) is int:
        changes["resolution"] = {"crop": [crop, crop]}
    if "trainer.steps" in keys_with_values(typed):
        changes["trainer"] = {"epochs": None}
    return OmegaConf.merge(cfg, changes)  # type: ignore[return-value]


def search_path_override(folders: Sequence[str]) -> str:
    """Return the override that adds folders, of any name, to Hydra's search path for configs."""
    quoted = ["'" + folder.replace("'", "\\'") + "'" for folder in folders]
    return f"{SEARCH_PATH}=[{','.join(quoted)}]"


def folder_words(folders: Sequence[str]) -> list[str]:
    """Return the words of a command line that add folders of config groups; an option of the first one counts."""
    if not folders:
        return []
    first, *others = folders
    more = [search_path_override([f"file://{folder}" for folder in others])] if others else []
    return [*more, "--config-dir", first]  # a flag that Hydra takes once


def keys_with_values(typed: Sequence[Override]) -> set[str]:
    """Return the keys that overrides set to another value than null."""
    return {override.key_or_group for override in typed if override.value() is not None}
