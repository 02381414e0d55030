"""Errors of composing a config: each names the key or option, the rule that it breaks, and the remedy."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dinoseg.config.options import (
    list_groups,
    modes_with,
    nested_groups,
    nested_keys,
    options_in,
    options_with,
)
from dinoseg.config.plain import keys_of
from dinoseg.utils.errors import NoMode, UnknownKey, UnknownOption, UserError
from dinoseg.utils.wording import format_override, join_names, suggest_nearest

ADD_FOLDER = "Add the folder of config groups that has it: --config-dir FOLDER, or config_dir=FOLDER in Python."
_NOT_READ = "{}: mode={} does not read the group {}. Leave it out, or choose a mode that reads it: {}."
_DEFAULT_MODE = "help"
_PATHS = {"data": "data.root", "backbone": "backbone.weights", "head": "head.weights"}  # keys of paths by group


def unknown_option(group: str, option: str, folders: Sequence[Path]) -> UnknownOption:
    """Return the error on an option that no folder has."""
    options = options_in(folders, group)
    question = suggest_nearest(option, options, f"{group}=")
    remedy = f" For a path, set {_PATHS[group]}={option}." if group in _PATHS and os.path.exists(option) else ""
    message = f"{group}={option} is unknown.{question} Choose from {', '.join(options)}.{remedy}"
    return UnknownOption(message, group=group, option=option)


def not_a_list_group(group: str, options: Sequence[str], folders: Sequence[Path]) -> UserError:
    """Return the error on a list of options for a group that takes one."""
    known = ", ".join(options_in(folders, group))
    return UserError(
        f"{group}={format_override(options)} is a list, and {group} takes one option. Choose one of {known}."
    )


def missing_option(group: str, option: str) -> UserError:
    """Return the error on an option that a file names, and that no folder has."""
    return UserError(f"{group}={option} is not an option on this machine. {ADD_FOLDER}")


def group_not_read(
    key: str, option: Any, origin: str | None, choices: Mapping[str, Any], folders: Sequence[Path]
) -> UserError:
    """Return the error on an option of a group that the mode does not compose.

    Args:
        key: name of the group in Hydra's overrides.
        option: of the group.
        origin: file whose defaults list chooses it; None: a caller's choice.
        choices: option of each group that is composed.
        folders: of config groups, the shipped one first.
    """
    group, _, place = key.partition("@")
    mode = choices.get("mode")
    if origin is not None and origin.startswith("hparam/"):
        return UserError(
            f"hparam={origin.partition('/')[2]} sets {key}, which mode={mode} does not read. Leave hparam out: "
            "resume=RUN brings the settings of its training, and data=DATASET those of a dataset."
        )
    if origin is not None:
        return UserError(f"{origin}.yaml sets {key}, which mode={mode} does not read. Remove the entry.")
    if "/" in group and group in nested_groups(folders):
        return UserError(f"{key}={option}: no chosen option of {group.partition('/')[0]} has it. Leave it out.")
    modes = modes_with(folders, group)
    if mode == _DEFAULT_MODE and modes:
        return no_mode(folders)
    if mode in modes:
        return UserError(f"{key}={option}: no defaults list has the group {group} at {place}. Leave out @{place}.")
    return UserError(_NOT_READ.format(f"{key}={option}", mode, group, ", ".join(modes) or "none here"))


def no_mode(folders: Sequence[Path]) -> NoMode:
    """Return the error on words of a job without a mode."""
    modes = ", ".join(options_in(folders, "mode"))
    return NoMode(f"No mode is given. Add mode=NAME. Modes: {modes}. `--help` shows their commands.")


def repeated_group(key: str, name: str) -> UserError:
    """Return the error on a group that two defaults lists compose at one place."""
    return UserError(f"{name}.yaml composes the group {key}, which another file composes, too. Use override {key}.")


def circular_defaults(path: Path) -> UserError:
    """Return the error on a config file whose defaults list leads to itself."""
    return UserError(f"The defaults list of {path} includes that file again. Remove the entry.")


def unreadable_file(path: Path, reason: Any) -> UserError:
    """Return the error on a file that is no config file."""
    text = (str(reason).strip() or type(reason).__name__).splitlines()[0]
    return UserError(f"{path} is not a config file ({text}). Write keys and values into it, as UTF-8.")


def invalid_value(key: str, value: Any, reason: Any) -> UserError:
    """Return the error on a value that a key of the config cannot take."""
    text = (str(reason).strip() or type(reason).__name__).splitlines()[0]
    return UserError(f"{key}={format_override(value)} is not a value of this key ({text}). Correct it.")


def unknown_key(
    key: str, value: Any, config: Mapping[str, Any], choices: Mapping[str, Any], folders: Sequence[Path]
) -> UserError:
    """Return the error on a key that a config lacks, with the modes or options that have it, else a near key.

    Args:
        key: the full key.
        value: that it would have.
        config: that of the chosen options, as plain values.
        choices: option of each group.
        folders: of config groups, the shipped one first.
    """
    root = key.partition(".")[0]
    word = f"{key}={format_override(value)}"
    mode = choices["mode"]
    options = options_with(folders, key)
    if root not in config:
        options = options or options_with(folders, root)
        modes = modes_with(folders, root)
        if mode == _DEFAULT_MODE and (options or modes):
            return no_mode(folders)
        if modes and mode not in modes:
            return UserError(_NOT_READ.format(word, mode, root, ", ".join(modes)))
    if not options:
        nested = [name for name in nested_keys(folders) if not name.startswith("hydra.")]
        known = dict.fromkeys([*keys_of(config), *nested])
        message = f"{key} is not a key of the config.{suggest_nearest(key, list(known))} docs/config.md lists the keys."
        return UnknownKey(message, key=key)
    is_list = root in list_groups(folders)
    if is_list:
        options = [f"{root}=[{option.partition('=')[2]}]" for option in options]
    chosen = f"{root}={choices[root]}" if root in choices and not is_list else "the config"
    message = f"{word}: {chosen} lacks this key. Options that have it: {join_names(options, 8)}. Choose one, or leave "
    return UnknownKey(f"{message}the key out.", key=key)
