"""Error messages for command lines that Hydra cannot compose: the mistake, and the nearest keys or options."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Glob, IntervalSweep, Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from dinoseg.cli.extras import find_plugin_failure
from dinoseg.cli.own_keys import checkpoint_configs
from dinoseg.cli.words import FILES, assignments, is_sweep, lists_of, parse_word, values_of
from dinoseg.config.options import (
    list_groups,
    modes_with,
    nested_groups,
    nested_keys,
    options_in,
    options_with,
)
from dinoseg.config.plain import keys_of, to_container
from dinoseg.utils.errors import UserError
from dinoseg.utils.wording import format_value, join_names, nearest

_HELP = "dinoseg.modes.help.show"  # default mode
_ALL_KEYS = "Add `--cfg job` to see all keys, `--help` alone to see all groups and options."


@contextmanager
def explain_errors(arguments: Sequence[str], folders: Sequence[Path]) -> Iterator[None]:
    """Turn errors of composing and running a command line into a `UserError` that names the mistake and its fix.

    Args:
        arguments: the command line, without the program's name.
        folders: of config groups, the shipped one first.

    Raises:
        UserError: instead of an error of Hydra and its plug-ins, of a YAML file, or of a value that an override gives.
    """
    try:
        _check_lists(arguments, folders)
        yield
    except UserError:  # some are also errors of OmegaConf
        raise
    except YAMLError as error:  # in a user's config file
        text = " ".join(str(error).split())
        raise UserError(f"A config file is not valid YAML: {text}. Correct the file.") from None
    except Exception as error:
        if isinstance(error, OSError) and error.errno:  # also of an option that is too long for the name of a file
            check_words(arguments, folders)
            raise
        if isinstance(error, HydraException | OmegaConfBaseException | ValueError | TypeError):  # of composing
            check_words(arguments, folders)
        configs = checkpoint_configs(arguments, folders)
        message = find_mistake(arguments, folders, error, configs) or find_plugin_failure(arguments, error)
        if not message:
            raise
        raise UserError(message) from error


def check_words(arguments: Sequence[str], folders: Sequence[Path]) -> None:
    """Refuse words that are not KEY=VALUE, unknown options of groups, values that need a sweep, and lost sweeps.

    Args:
        arguments: the command line, without the program's name.
        folders: of config groups, the shipped one first.

    Raises:
        UserError: naming the word and its fix.
    """
    several = is_sweep(arguments)
    words = [word for _, word in assignments(arguments)]
    searches = several and any(word.startswith("hydra/sweeper=") for word in words)
    swept: dict[str, str] = {}  # words with several values, by key
    has_more_folders = any(word.startswith("hydra.searchpath=") for word in words)  # whose options only Hydra finds
    for position, word in enumerate(words):
        if "=" not in word and not word.startswith("~"):
            before = words[position - 1] if position else ""
            if before.endswith("="):
                raise UserError(f"{before} {word} has a space next to the equals sign. Write {before}{word}.")
            raise UserError(f"{word} is not KEY=VALUE.{nearest(word, options_in(folders, 'mode'), 'mode=')}")
        override = parse_word(word)
        if override is None:
            raise UserError(f"{word} cannot be parsed: {_unparsed_reason(word, words[position + 1 :])}")
        text = word.partition("=")[2]
        if isinstance(override.value(), IntervalSweep) and not searches:
            raise UserError(f"{word} is an interval: add -m hydra/sweeper=optuna to search it, or list values.")
        if override.is_sweep_override() and not several:
            raise UserError(
                f"{word} gives several values. For a list use brackets: '{override.key_or_group}=[{text}]'. For a run "
                "with each of them, add -m."
            )
        key = override.get_key_element().lstrip("+")
        if key in swept:
            raise UserError(f"{swept[key]} and {word} set the same key, and a sweep runs only the last. Give one.")
        if override.is_sweep_override():
            swept[key] = word
        if _is_group(override, folders) and not (override.is_delete() or has_more_folders):
            _check_options(override, folders)


def _check_options(override: Override, folders: Sequence[Path]) -> None:
    group = _group_of(override)
    options = options_in(folders, group)
    bases = {path.stem for folder in folders for path in (folder / group).glob("_*.yaml")}
    for option in _named_options(override, options):
        if option not in bases.union(options):
            question = nearest(option, options, f"{group}=")
            paths = [f" For a path, set {key}={option}." for key in FILES if key.startswith(f"{group}.")]
            remedy = paths[0] if paths and os.path.exists(option) else ""
            raise UserError(f"{group}={option} is unknown.{question} Choose from {', '.join(options)}.{remedy}")


def _check_lists(arguments: Sequence[str], folders: Sequence[Path]) -> None:
    """Refuse a list of options for a group that takes one, whose keys Hydra would merge, and missing folders."""
    for _, word in assignments(arguments):
        override = parse_word(word) if "[" in word else None
        if not override or not (lists := lists_of(override)):
            continue
        group = _group_of(override)
        if _is_group(override, folders) and group not in list_groups(folders):
            options = ", ".join(options_in(folders, group))
            raise UserError(f"{word} is a list, and {group} takes one option. Choose one of {options}.")
        items = [item for each in lists for item in each]
        absent = [item for item in items if group == "hydra.searchpath" and not _is_source(str(item))]
        if absent:
            raise UserError(f"{word}: {absent[0]} is not found. Give a folder as file://FOLDER, or as pkg://PACKAGE.")


def _is_source(source: str) -> bool:
    """Return whether an entry of Hydra's search path is a folder or package; one that refers to a key may be."""
    schema, _, name = source.rpartition("://")
    with suppress(ModuleNotFoundError):  # of the package above
        if "${" in source or (schema == "pkg" and find_spec(name)):
            return True
    return schema in ("", "file") and Path(name).is_dir()


def _is_group(override: Override, folders: Sequence[Path]) -> bool:
    """Return whether an override chooses options of a group, and sets no keys; Hydra's own groups do not count."""
    group = _group_of(override)
    is_option = not group.startswith("hydra") and not isinstance(override.value(), dict)
    return is_option and any((folder / group).is_dir() for folder in folders)


def _group_of(override: Override) -> str:
    return override.get_key_element().lstrip("+~").split("@")[0]


def _input_line(override: Override) -> str:
    """Return the word of an override, as it was typed."""
    return override.input_line or ""


def _named_options(override: Override, options: Sequence[str]) -> list[str]:
    """Return the options that an override names; a glob without matches is returned as it was typed."""
    value = override.value()
    if lists := lists_of(override):
        return [str(option) for each in lists for option in each]
    return (value.filter(options) if isinstance(value, Glob) else []) or values_of(override)


def _unparsed_reason(word: str, following: Sequence[str]) -> str:
    """Return why Hydra cannot parse a word, and how to write it.

    Args:
        word: such as `resolution.crop=[64,96`.
        following: the words after it, which the shell has split off where a list or table holds a space.
    """
    for count in range(1, len(following) + 1):
        whole = " ".join((word, *following[:count]))
        if parse_word(whole) is not None:
            return f"the shell has split it at a space. Quote the whole word: '{whole}'."
    closed = _close_brackets(word)
    if closed != word and parse_word(closed) is not None:
        return f"a bracket or brace is not closed. Write '{closed}'."
    key, _, text = word.partition("=")
    dotted = f"{key.replace('/', '.')}={text}"
    if dotted != word and parse_word(dotted) is not None:
        return f"only groups have slashes, and their keys have dots. Write '{dotted}'."
    form = f'"{text}"' if _is_text(text) else '["a value"]'
    return (
        "brackets, braces or quotes are not closed, or the text inside them holds special characters. Quote the whole "
        f"word, and the text inside it: '{key}={form}'."
    )


def _close_brackets(word: str) -> str:
    """Return a word with the brackets and braces closed that it only opens."""
    missing = ""
    for character in word:
        if character in "[{":
            missing = {"[": "]", "{": "}"}[character] + missing
        elif missing.startswith(character):
            missing = missing[1:]
    return word + missing


def _is_text(value: str) -> bool:
    """Return whether a value with braces or brackets, such as {split}/pictures, is text: neither a list nor a table."""
    closed = all(value.count(first) == value.count(last) for first, last in ("[]", "{}"))
    return closed and not re.search(r"['\"]|^\[.*\]$|^\{.*\}$", value)


def find_mistake(
    arguments: Sequence[str],
    folders: Sequence[Path],
    error: Exception,
    configs: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Return which override caused an error, and its fix; "" if none did.

    Overrides are compared with the config of the chosen options alone. If all fit, an error of Hydra or OmegaConf is
    returned in short.

    Args:
        arguments: the command line, without the program's name.
        folders: of config groups, the shipped one first.
        error: raised by Hydra, or by a job.
        configs: of checkpoints, whose keys may be set too.
    """
    found = [override for _, word in assignments(arguments) if (override := parse_word(word))]
    overrides = [override for override in found if not override.key_or_group.startswith("hydra")]
    groups = [override for override in overrides if _is_group(override, folders)]
    deleted = [override for override in overrides if override.is_delete()]
    options = []
    for override in groups:
        chosen = _named_options(override, options_in(folders, _group_of(override)))
        lists = lists_of(override)
        if (chosen or lists) and override not in deleted:
            option = f"[{','.join(map(str, lists[0]))}]" if lists else chosen[0]
            options.append(f"{override.get_key_element()}={option}")
    mode = next((option for option in options if option.startswith("mode=")), None)
    try:
        cfg, choices = _compose(options, folders)
    except HydraException as composing:
        if mode is None:
            return mode_needed(folders)
        absent = re.search(r"(?:In 'hparam/(.+)': )?Could not override '(\w+)", str(composing))
        if absent and mode.removeprefix("mode=") not in modes_with(folders, absent[2]):
            typed = next((_input_line(each) for each in groups if _group_of(each) == absent[2]), absent[2])
            return _absent_group(typed, absent[2], absent[1], mode, folders)
        if not isinstance(error, HydraException):
            return ""
        return _shorten(error) or _unreadable_file(error, folders)
    except (OSError, ValueError, RecursionError) as composing:
        return _unreadable_file(composing, folders)
    for config in configs:
        cfg |= config
        choices = {group: option for group, option in choices.items() if group not in config}
    for override in overrides:
        if override not in groups and override not in deleted:
            misfit = _find_misfit(override, cfg, choices, folders)
            if misfit:
                return misfit
    keys = [*keys_of(cfg)]
    for override in deleted:
        key = override.key_or_group
        if override in groups or key in keys:
            return f"~{key} removes a key that is read. Leave it out, or set {key} to another value."
    if isinstance(error, HydraException):
        absent = re.match(r"Could not override '([\w.]+)'", str(error))
        if absent and is_sweep(arguments):  # the options of the first job have it
            return (
                f"{absent[1]} is not a key of all options that this sweep chooses. Leave it out, or sweep over the "
                "options that have it."
            )
        return _shorten(error)
    if not isinstance(error, OmegaConfBaseException):
        return ""
    for override in overrides:
        if "${" in str(override.value()):
            typed = _input_line(override).removeprefix("++")  # which `with_checkpoint_keys` adds
            return (
                f"{typed} refers to a key that does not exist, or is not a valid value. Give a value, or the full name "
                "of another key, such as '${seed}'."
            )
    cause = (str(error).strip().splitlines() or ["no details"])[0]
    typed = " ".join(word.removeprefix("++") for word in arguments)
    return f"{error.full_key or 'A key'} has no usable value after {typed} ({cause}). Undo these overrides."


def mode_needed(folders: Sequence[Path]) -> str:
    """Return the message on a command line without a mode."""
    modes = ", ".join(options_in(folders, "mode"))
    return f"No mode is given. Add mode=NAME. Modes: {modes}. `--help` shows their commands."


def _absent_group(word: str, group: str, recipe: str | None, mode: str, folders: Sequence[Path]) -> str:
    """Return the message on a word that sets a group which a mode does not compose; `recipe` sets it, or None."""
    if recipe is not None:
        return (
            f"hparam={recipe} sets {group}, which {mode} does not read. Leave hparam out: resume=RUN brings the "
            "settings of its training, and data=DATASET those of a dataset."
        )
    if mode == "mode=compare" and word.startswith("data.group="):
        return (
            f"{word}: {mode} uses the groups of the evaluations. Evaluate each run again: mode=eval resume=RUN {word}."
        )
    modes = ", ".join(modes_with(folders, group))
    return f"{word}: {mode} does not read the group {group}. Leave it out, or choose a mode that reads it: {modes}."


def _unreadable_file(error: Exception, folders: Sequence[Path]) -> str:
    """Return the message on a config file that Hydra cannot read; "" if there is none.

    Args:
        error: raised by composing; it names no file if that is no text or no mapping.
        folders: of config groups, the shipped one first.
    """
    for path in (path for folder in folders[1:] for path in sorted(folder.rglob("*.yaml")) if path.is_file()):
        try:
            OmegaConf.load(path)
        except (OSError, ValueError, RecursionError, OmegaConfBaseException) as reason:
            text = (str(reason).strip() or type(reason).__name__).splitlines()[0]
            return f"{path} is not a config file ({text}). Write keys and values into it, as UTF-8."
    if isinstance(error, RecursionError):
        return "The defaults list of a config file includes that file again. Remove the entry."
    return f"{error}. Correct that file." if str(error) else ""


def _unknown_key(
    key: str, word: str, cfg: Mapping[str, Any], choices: Mapping[str, str], folders: Sequence[Path]
) -> str:
    """Return the message on a key that the config lacks: the modes and options that have it, else a near key.

    Args:
        key: the full key.
        word: that sets it.
        cfg: config of the chosen options alone.
        choices: option of each group.
        folders: of config groups, the shipped one first.
    """
    root, _, below = key.partition(".")
    if root not in cfg:
        modes, options = modes_with(folders, root), options_with(folders, root)
        if cfg["mode"]["_target_"] == _HELP and (modes or options):
            return mode_needed(folders)
        if modes and choices["mode"] not in modes:
            return _absent_group(word, root, None, f"mode={choices['mode']}", folders)
        if options and not modes:
            return f"{key} is a key of {' or '.join(options)}. Add it, or leave the key out."
    if options := options_with(folders, key):
        if root in list_groups(folders):
            remedy = f"Add one to the list, such as {root}=[{options[0].partition('=')[2]}], or leave the key out."
            return f"{word}: no chosen option has this key. Options that have it: {join_names(options, 8)}. {remedy}"
        chosen = f"{root}={choices[root]}" if root in choices else f"the {root} of the checkpoint"
        remedy = "Choose one of them, or leave the key out." if root in choices else "Leave the key out."
        if len(options) == 1 and "/" in options[0]:  # a nested group, whose option stands beside those of the groups
            remedy = f"Write {options[0]} {word}, or leave the key out."
        return f"{word}: {chosen} has no key {below}. Options that have it: {join_names(options, 8)}. {remedy}"
    known = [*keys_of(cfg)]
    nested = nested_keys(folders)
    alike = [each for each in (*known, *nested) if each.rpartition(".")[2] == key.rpartition(".")[2]]
    found = nearest(key, known)
    if alike and not {*alike} & {*known}:
        found = "".join(f" {each} is one, with {nested[each]}." for each in alike)
    return f"{key} is not a key of the config.{found} {_ALL_KEYS}"


def _nested_options(key: str, folders: Sequence[Path]) -> list[str]:
    """Return the options of the nested group at a key such as `data.pixels`; none for another key."""
    group = key.replace(".", "/")
    return options_in(folders, group) if group in nested_groups(folders) else []


def _compose(options: Sequence[str], folders: Sequence[Path]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the config composed from these options alone, and the option of each of its groups."""
    sources = ",".join(f'"file://{folder.absolute()}"' for folder in folders[1:])
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(folders[0]), version_base="1.3"):
        cfg = to_container(compose("main", [f"hydra.searchpath=[{sources}]", *options], return_hydra_config=True))
    return cfg, cfg.pop("hydra")["runtime"]["choices"]


def _find_misfit(
    override: Override, cfg: Mapping[str, Any], choices: Mapping[str, str], folders: Sequence[Path]
) -> str:
    """Return why the key of an override, or its value, does not fit a config; "" if both fit."""
    key = override.key_or_group
    value = override.value()
    adds = override.is_add() or override.is_force_add()
    node: Any = cfg
    above: list[str] = []
    for part in key.split("."):
        named = {str(name): each for name, each in node.items()} if isinstance(node, Mapping) else {}
        if isinstance(node, list):
            if not part.isdecimal():
                where = ".".join(above)
                return f"{key}: a list has no key {part}. Its items are numbered from 0, as in {where}.0=VALUE."
            named = {str(index): each for index, each in enumerate(node)}
        if isinstance(node, str) and "${" in node or (node is None and len(above) > 1):  # may stand for a table
            return ""
        if not isinstance(node, Mapping | list):
            where = ".".join(above)
            return f"{key}: {where} is a single value and has no keys below it. Set it as {where}=VALUE."
        if part not in named:
            return "" if adds else _unknown_key(key, _input_line(override), cfg, choices, folders)
        node = named[part]
        above.append(part)
    if isinstance(node, list) and isinstance(value, Mapping):
        return f"{key} is a list. Write it in brackets: {key}=[...]."
    if not isinstance(node, Mapping):
        return ""
    word = _input_line(override)
    nested = _nested_options(key, folders)
    if nested and (not isinstance(value, Mapping) or "name" in value):
        options = ", ".join(f"{key.replace('.', '/')}={each}" for each in nested)
        return f"{word}: {key} has options, which are words of their own. Choose one: {options}."
    if not isinstance(value, Mapping):
        names = "|".join(str(name) for name in node if not str(name).startswith("_"))
        text = "null" if value is None else value
        return f"{key}={text}: {key} is a group of keys. Set one of them: {key}.{names}=VALUE."
    new = [str(name) for name in value if name not in node]
    if adds or not new:
        return ""
    if nested:
        return _unknown_key(f"{key}.{new[0]}", f"'{word}'", cfg, choices, folders)
    return f"{key} has no {' or '.join(new)}. To add it, put ++ before the word, in quotes: '++{word}'."


def _shorten(error: Exception) -> str:
    """Return Hydra's message without its hints and its search path."""
    text = str(error).partition("Config search path:")[0]
    if merged := re.match(r"Error merging override (.*)", text):
        word = merged[1]
        return f"{format_value(word)} leaves {word.lstrip('~+').partition('=')[0]} without a valid value. Leave it out."
    lines = [line for line in text.splitlines() if "HYDRA_FULL_ERROR" not in line]
    return re.sub(r"\n{2,}", "\n", "\n".join(lines)).strip()
