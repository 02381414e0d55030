"""The config of a job that Hydra has composed, and the options and values in words of a command line."""

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from omegaconf import DictConfig, OmegaConf

from dinoseg.config.composition import SHIPPED, Value, expand_short_forms
from dinoseg.config.grammar import decode_keys
from dinoseg.config.options import existing_choices, is_group, list_groups
from dinoseg.config.plain import to_container

SEARCH_PATH = "hydra.searchpath"
_SIGNS = {OverrideType.ADD: "+", OverrideType.FORCE_ADD: "++", OverrideType.DEL: "~"}


def job_config(cfg: DictConfig, hydra: Any) -> DictConfig:
    """Return the whole config of a job.

    It is the one composed by Hydra, with two further keys: `choices`, the option of each group, and `config_dirs`, the
    folders of config groups other than the shipped one.

    Args:
        cfg: composed by Hydra.
        hydra: Hydra's own config of the job, with its choices, its sources of configs and the overrides.
    """
    typed = OverridesParser.create().parse_overrides(to_container(hydra.overrides)["task"])
    job = {key: value for key, value in to_container(cfg).items() if key != "hydra"}
    folders = [_folder(source["schema"], source["path"]) for source in hydra.runtime["config_sources"]]
    own = [folder for folder in folders if folder not in (None, str(SHIPPED))]
    # Hydra does not record lists of options; each file of these groups has a key of its own name
    searched = [SHIPPED, *map(Path, filter(None, own))]
    lists = sorted(list_groups(searched))
    listed = {group: [*(job.get(group) or ())] for group in lists}
    chosen = {group: option for group, option in hydra.runtime["choices"].items() if not group.startswith("hydra/")}
    choices = {**existing_choices(chosen, searched), **listed}
    whole = {**decode_keys(job), "choices": choices, "config_dirs": own}
    return expand_short_forms(OmegaConf.create(whole), keys_with_values(typed))


def read_words(words: Sequence[str], folders: Sequence[Path]) -> tuple[dict[str, Any], list[Value], list[Path]]:
    """Return what words of a command line choose and set: options of groups, values of keys, and further folders.

    Args:
        words: overrides that Hydra can parse.
        folders: of config groups, the shipped one first.
    """
    overrides = OverridesParser.create().parse_overrides(list(words))
    sources: list[Any] = []
    for override in overrides:
        if override.key_or_group == SEARCH_PATH and isinstance(listed := override.value(), list):
            sources += listed
    more = [Path(folder) for folder in map(_folder_of, sources) if folder is not None]
    options: dict[str, Any] = {}
    values = []
    for override in overrides:
        key, value = override.key_or_group, override.value()
        if key == SEARCH_PATH:
            continue
        if not is_group((*folders, *more), key) or isinstance(value, dict):
            sign = _SIGNS.get(override.type, "")
            values.append(Value(key, decode_keys(value), sign, override.input_line or ""))
        else:
            options[override.get_key_element()] = value
    return options, values, more


def _folder_of(source: str) -> str | None:
    """Return the folder of an entry of Hydra's search path, such as `file://FOLDER`; see `_folder`."""
    schema, _, path = source.rpartition("://")
    return _folder(schema or "file", path)


def _folder(schema: str, path: str) -> str | None:
    """Return the folder of a source in Hydra's search path; None if it is no folder, or Hydra's own."""
    if schema == "file":
        return path
    return str(files(path.replace("/", "."))) if schema == "pkg" and not path.startswith("hydra") else None


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


def mask_keys(data: DictConfig) -> dict[str, Any]:
    """Return a data set's mask encoding, as keys of `Masks`; empty for a fixed format."""
    node = data.reader.get("masks")
    keys = {} if node is None else to_container(node, resolve=True)
    return {key: value for key, value in keys.items() if key not in ("_target_", "described")}
