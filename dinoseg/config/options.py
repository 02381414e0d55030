"""Options of config groups, and the files that set their keys."""

import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml


def config_folders(arguments: Sequence[str], shipped: Path) -> list[Path]:
    """Return the folders of config groups: the shipped one first, then those given by `--config-dir`."""
    flags = ("--config-dir", "-cd")
    named = [value for flag, value in pairwise(arguments) if flag in flags]
    named += [word.partition("=")[2] for word in arguments if word.partition("=")[0] in flags and "=" in word]
    return [shipped, *map(Path, named)]


def options_of(group: Path) -> list[str]:
    """Return the options in a group's folder; its own folders hold nested groups."""
    return sorted(path.stem for path in group.glob("*.yaml") if not path.name.startswith("_"))


def options_in(folders: Iterable[Path], group: str) -> list[str]:
    """Return the options of a group in any of the folders of config groups, each once."""
    return sorted({option for folder in folders for option in options_of(folder / group)})


def nested_groups(folders: Sequence[Path]) -> set[str]:
    """Return the groups in folders of other groups, such as `data/pixels`, of the first folder, which is shipped.

    The others may hold anything besides config groups, and take long to search.
    """
    shipped = folders[0]
    paths = [path for path in shipped.glob("*/**/") if path.parent != shipped]
    return {path.relative_to(shipped).as_posix() for path in paths if options_of(path)}


def option_files(folders: Sequence[Path], group: str, option: str) -> Iterator[Path]:
    """Yield the files that set an option's keys: those of its group in its defaults list, and its own, which overrides.

    Args:
        folders: of config groups; the first one with the file counts.
        group: of the option.
        option: name of a file; nothing is yielded without one.
    """
    paths = [folder / group / f"{option}.yaml" for folder in folders]
    path = next((path for path in paths if os.path.isfile(path)), None)  # False for a typed name that no file can have
    if path is None:
        return
    # a file of the same group in the defaults list is a base, such as `mode/_model`: its keys are this option's, too
    for entry in _defaults_of(path):
        if isinstance(entry, str) and entry != "_self_":
            yield from option_files(folders, group, entry.removeprefix(f"/{group}/"))
    yield path


def modes_with(folders: Sequence[Path], group: str) -> list[str]:
    """Return the modes that compose a group; help, which composes nearly all, reads none."""
    return [mode for mode in options_in(folders, "mode") if mode != "help" and group in groups_of(folders, mode)]


def groups_of(folders: Sequence[Path], mode: str) -> list[str]:
    """Return the groups in the defaults lists of a mode's files, each once."""
    groups = [
        name.removeprefix("optional ").strip("/").partition("@")[0]
        for path in option_files(folders, "mode", mode)
        for entry in _defaults_of(path)
        if isinstance(entry, Mapping)
        for name in entry
    ]
    return list(dict.fromkeys(groups))


def is_group(folders: Iterable[Path], name: str) -> bool:
    """Return whether one of the folders has a config group, such as `head` or `data/pixels`."""
    return any(os.path.isdir(folder / name) for folder in folders)  # False for a name that no folder can have


def has_options(folders: Sequence[Path], command: str) -> bool:
    """Return whether the folders have each option that a command line names; an extension may have been deleted."""
    words = [word.split("=", 1) for word in command.split() if "=" in word]
    named = [(group, option) for group, options in words if is_group(folders, group) for option in options.split(",")]
    return all(option in options_in(folders, group) for group, option in named)


def existing_choices(choices: Mapping[str, Any], folders: Sequence[Path]) -> dict[str, Any]:
    """Return the choices of options that exist: a defaults list names others as `optional`, such as `local: default`.

    A checkpoint that stored them could not be resumed, since nothing has their group.
    """

    def exists(group: str, option: str) -> bool:
        return any(os.path.isfile(folder / group.partition("@")[0] / f"{option}.yaml") for folder in folders)

    return {group: option for group, option in choices.items() if not isinstance(option, str) or exists(group, option)}


def choices_of(choices: Mapping[str, Any], keys: Collection[str]) -> dict[str, Any]:
    """Return the chosen options of the groups, nested ones included, that fill some root keys of a config."""
    return {group: option for group, option in choices.items() if root_of(group) in keys}


def root_of(group: str) -> str:
    """Return the root key that a group fills: `data` for `protocol@data.official` and `data/augment/color`."""
    return re.split("[/.]", group.rpartition("@")[2])[0]


def list_groups(folders: Sequence[Path]) -> set[str]:
    """Return the groups that take a list of options: their entry in a mode's defaults list is a list."""
    return {
        name.strip("/").partition("@")[0]
        for mode in options_in(folders, "mode")
        for path in option_files(folders, "mode", mode)
        for entry in _defaults_of(path)
        if isinstance(entry, Mapping)
        for name, option in entry.items()
        if isinstance(option, list)
    }


def options_with(folders: Sequence[Path], key: str) -> list[str]:
    """Return the options, as GROUP=OPTION, that alone bring a key: `adapter.rank`, or a root key such as `teacher`.

    Options of nested groups count, too: `data/pixels=files` brings `data.pixels.order`.
    """
    names = key.split(".")
    everywhere = {path.name for folder in folders for path in folder.glob("*/") if path.is_dir()}
    # `data.pixels.order` may be `order` of data/pixels, or `pixels.order` of data
    nested = {"/".join(names[:depth]): ".".join(names[depth:]) for depth in range(1, len(names))}
    return [
        f"{group}={option}"
        for group, below in (nested or dict.fromkeys(sorted(everywhere), "")).items()
        for option in options_in(folders, group)
        if any(_brings(path, key, below) for path in option_files(folders, group, option))
    ]


def nested_keys(folders: Sequence[Path]) -> dict[str, str]:
    """Return the keys that options of nested groups set, such as `data.pixels.order`, and one option for each."""
    return {
        f"{group.replace('/', '.')}.{key}": f"{group}={option}"
        for group in sorted(nested_groups(folders))
        for option in options_in(folders, group)
        for path in option_files(folders, group, option)
        for key in _read(path)
        if not key.startswith("_")
    }


def _brings(path: Path, key: str, below: str) -> bool:
    """Return whether an option's file sets a key, whose part below the option's group is given, too."""
    from dinoseg.config.plain import has_key  # imports OmegaConf, which help does not need

    is_global = "@package _global_" in path.read_text("utf-8")
    return has_key(_read(path), key if is_global else below)


def _defaults_of(path: Path) -> list[Any]:
    defaults = _read(path).get("defaults")
    return defaults if isinstance(defaults, list) else []


@lru_cache(maxsize=128)  # a command line may set many keys of one option
def _read(path: Path) -> Mapping[str, Any]:
    content = yaml.safe_load(path.read_text("utf-8"))
    return content if isinstance(content, dict) else {}  # Hydra refuses other files
