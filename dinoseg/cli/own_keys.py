"""Command-line keys that only the config of the named checkpoint has."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override, OverrideType

from dinoseg.cli.words import assignments, parse_word, values_of
from dinoseg.config.options import groups_of, is_group
from dinoseg.config.plain import has_key
from dinoseg.config.stored import Source, all_keys
from dinoseg.utils.errors import UserError


def with_checkpoint_keys(arguments: Sequence[str], folders: Sequence[Path]) -> list[str]:
    """Return a command line with `++` before the keys that the config of the checkpoint in `resume` has.

    Hydra validates keys against the groups on the command line (head=linear by default), before the checkpoint is read.
    With `++` it accepts any key, and `resume.merge` sets them in the checkpoint's config. Nothing changes for
    `resume=auto`: it looks for runs of the recipe that the command line composes.

    Args:
        arguments: the command line, without the program's name.
        folders: of config groups, the shipped one first.

    Raises:
        UserError: `resume` names no checkpoint.
    """
    configs = checkpoint_configs(arguments, folders)
    words = list(arguments)
    for position, override in _overrides(arguments) if configs else ():
        key = override.key_or_group
        if (
            override.type is OverrideType.CHANGE
            and not is_group(folders, key)
            and all(has_key(config, key) for config in configs)
        ):
            words[position] = f"++{words[position]}"
    return words


def checkpoint_configs(arguments: Sequence[str], folders: Sequence[Path]) -> list[Mapping[str, Any]]:
    """Return the reused config of each checkpoint in `resume` or `mode.model`.

    It lacks groups that are chosen again, and groups that the mode does not read.

    Raises:
        UserError: the checkpoint does not exist.
    """
    typed = {override.key_or_group: values_of(override) for _, override in _overrides(arguments)}
    paths = [path for path in typed.get("resume", ()) if path not in ("auto", "null")]
    paths += [path for path in typed.get("mode.model", ()) if path.endswith(".safetensors") and Path(path).is_file()]
    return [_reused_config(path, typed, folders) for path in paths]


def _reused_config(path: str, typed: Mapping[str, Sequence[str]], folders: Sequence[Path]) -> Mapping[str, Any]:
    from dinoseg.experiment.recipe import SAVED  # imports torch
    from dinoseg.training import checkpoint

    info = checkpoint.describe(checkpoint.find(path, "last"))
    again = {group for group, option in info["choices"].items() if typed.get(group, [option]) != [option]}
    config = {key: value for key, value in info["config"].items() if key in SAVED and _is_read(key, typed, folders)}
    with suppress(UserError):  # reported when the checkpoint is used
        config = all_keys({**info, "config": config}, Source(f"resume={path}", folders[1:]))
    return {key: value for key, value in config.items() if key not in again and _is_read(key, typed, folders)}


def _is_read(group: str, typed: Mapping[str, Sequence[str]], folders: Sequence[Path]) -> bool:
    """Return whether the typed mode reads a group of a checkpoint; slots come with the trainer of a checkpoint."""
    read = {each for mode in typed.get("mode", ()) for each in groups_of(folders, mode)}
    return group in read or "trainer" in read or "mode" not in typed


def _overrides(arguments: Sequence[str]) -> Iterator[tuple[int, Override]]:
    """Yield position and parsed form of the words that Hydra can parse."""
    for position, word in assignments(arguments):
        if override := parse_word(word):
            yield position, override
