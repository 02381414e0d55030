"""Checks of a command line: the words alone, then its keys in the config that its options compose."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Glob, IntervalSweep, Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError

from dinoseg.cli.extras import find_plugin_failure
from dinoseg.cli.own_keys import checkpoint_configs
from dinoseg.cli.words import FILES, assignments, is_sweep, lists_of, parse_word, values_of
from dinoseg.config.job import SEARCH_PATH, search_path_override
from dinoseg.config.options import (
    list_groups,
    modes_with,
    nested_groups,
    nested_keys,
    options_in,
    options_with,
    overridden_groups,
)
from dinoseg.config.plain import at, has_key, keys_of, to_container
from dinoseg.utils.errors import NoMode, UnknownKey, UnknownOption, UserError
from dinoseg.utils.wording import join_names, nearest

_ALL_KEYS = "Add `--cfg job` to see all keys, `--help` alone to see all groups and options."
# errors of composing; the last three are those of reading a file
_OF_COMPOSING = (HydraException, OmegaConfBaseException, YAMLError, OSError, ValueError, RecursionError)


@contextmanager
def explain_errors(arguments: Sequence[str], folders: Sequence[Path]) -> Iterator[None]:
    """Refuse words that cannot be composed, once composing or running them has failed.

    The checks run in this order: config files of the user, groups that the mode reads, keys, kinds of values.

    Args:
        arguments: the command line, without the program's name.
        folders: of config groups, the shipped one first.

    Raises:
        UserError: instead of an error of Hydra and its plug-ins, of a config file, or of a value that a word gives.
    """
    try:
        yield
    except UserError:  # some are also errors of OmegaConf
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno:  # of a disk, not of composing
            raise
        if isinstance(error, _OF_COMPOSING):
            _check_files(folders[1:])
        _check_keys(arguments, folders)
        message = find_plugin_failure(arguments, error) or _explain(error, arguments)
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
    has_more_folders = any(word.startswith(f"{SEARCH_PATH}=") for word in words)  # whose options only Hydra finds
    swept: dict[str, str] = {}  # words with several values, by key
    for position, word in enumerate(words):
        override = parse_word(word)
        if override is None:
            raise UserError(_explain_unparsed(word, words[position + 1 :], folders))
        key = override.get_key_element().lstrip("+")
        if isinstance(override.value(), IntervalSweep) and not searches:
            raise UserError(f"{word} is an interval: add -m hydra/sweeper=optuna to search it, or list values.")
        if override.is_sweep_override() and not several:
            raise UserError(
                f"{word} gives several values. For a list use brackets: '{key}=[{word.partition('=')[2]}]'. For a run "
                "with each of them, add -m."
            )
        if key in swept:
            raise UserError(f"{swept[key]} and {word} set the same key, and a sweep runs only the last. Give one.")
        if override.is_sweep_override():
            swept[key] = word
        for source in chain(*lists_of(override)) if key == SEARCH_PATH else ():
            if not _is_source(str(source)):
                raise UserError(f"{word}: {source} is not found. Give a folder as file://FOLDER, or as pkg://PACKAGE.")
        if _is_group(override, folders) and not (override.is_delete() or has_more_folders):
            _check_options(override, folders)


def _is_source(source: str) -> bool:
    """Return whether an entry of Hydra's search path is a folder or package; one that refers to a key may be."""
    schema, _, name = source.rpartition("://")
    with suppress(ModuleNotFoundError):  # of the package above
        if "${" in source or (schema == "pkg" and find_spec(name)):
            return True
    return schema in ("", "file") and Path(name).is_dir()


def _explain_unparsed(word: str, following: Sequence[str], folders: Sequence[Path]) -> str:
    """Return why Hydra cannot parse a word, and how to write it; the shell may have split it from the `following`."""
    key, equals, text = word.partition("=")
    if not equals:
        question = nearest(word, options_in(folders, "mode"), "mode=")
        return f"{word} is not KEY=VALUE. Write key and value as one word, without spaces.{question}"
    split = [" ".join((word, *following[:count])) for count in range(1, len(following) + 1)]
    fixes = dict.fromkeys(split, "the shell has split it at a space. Quote the whole word:")
    fixes |= {f"{word}{end}": "a bracket or brace is not closed. Write" for end in ("]", "}", "]]", "]}", "}]", "}}")}
    fixes[f"{key.replace('/', '.')}={text}"] = "only groups have slashes, and their keys have dots. Write"
    for fixed, reason in fixes.items():
        if parse_word(fixed) is not None:
            return f"{word} cannot be parsed: {reason} '{fixed}'."
    form = '["a value"]' if text.startswith("[") or '"' in text else f'"{text}"'
    return f"{word} cannot be parsed. Quote the whole word, and the text inside it: '{key}={form}'."


def _is_group(override: Override, folders: Sequence[Path]) -> bool:
    """Return whether an override chooses options of a group, and sets no keys; Hydra's own groups do not count."""
    is_option = not override.key_or_group.startswith("hydra") and not isinstance(override.value(), dict)
    return is_option and any(os.path.isdir(folder / override.key_or_group) for folder in folders)


def _options_of(override: Override, known: Sequence[str]) -> list[str]:
    """Return the options that an override names; a glob without matches is returned as it was typed."""
    value = override.value()
    matches: list[str] = value.filter(list(known)) if isinstance(value, Glob) else []
    return matches or [str(option) for each in lists_of(override) or [values_of(override)] for option in each]


def _check_options(override: Override, folders: Sequence[Path]) -> None:
    """Refuse options without a file, and a list for a group that takes one option, whose keys Hydra would merge."""
    group = override.key_or_group
    options = options_in(folders, group)
    if lists_of(override) and group not in list_groups(folders):
        raise UserError(
            f"{override.input_line} is a list, and {group} takes one option. Choose one of {', '.join(options)}."
        )
    for option in _options_of(override, options):
        if not any(os.path.isfile(folder / group / f"{option}.yaml") for folder in folders):
            paths = [f" For a path, set {key}={option}." for key in FILES if key.startswith(f"{group}.")]
            remedy = "".join(paths) if os.path.exists(option) else ""
            question = nearest(option, options, f"{group}=")
            raise UnknownOption(
                f"{group}={option} is unknown.{question} Choose from {', '.join(options)}.{remedy}",
                group=group,
                option=option,
            )


def _check_files(folders: Sequence[Path]) -> None:
    """Refuse config files of the user that Hydra cannot read; its own errors may name no file."""
    for path in (path for folder in folders for path in sorted(folder.rglob("*.yaml")) if path.is_file()):
        try:
            OmegaConf.load(path)
        except _OF_COMPOSING as error:
            text = str(error).splitlines()[0] if isinstance(error, OmegaConfBaseException) else str(error)
            reason = " ".join(text.split()) or type(error).__name__
            raise UserError(
                f"{path} is not a config file ({reason}). Write keys and values into it, as UTF-8."
            ) from None


def _check_keys(arguments: Sequence[str], folders: Sequence[Path]) -> None:
    """Refuse words whose group, key or kind of value does not fit the config of the chosen options alone.

    Of a sweep, the options of the first job are composed. Keys of checkpoints in `resume` may be set, too.
    """
    found = [override for _, word in assignments(arguments) if (override := parse_word(word))]
    overrides = [override for override in found if not override.key_or_group.startswith("hydra")]
    groups = [override for override in overrides if _is_group(override, folders)]
    options = {each.get_key_element(): _first_option(each, folders) for each in groups if not each.is_delete()}
    try:
        cfg, choices = _compose(options, folders)
    except _OF_COMPOSING as error:
        if "mode" not in options:
            raise no_mode(folders) from None
        words = {group: f"{group}={option}" for group, option in options.items()}
        recipe = options.get("hparam", "")
        words |= dict.fromkeys(overridden_groups(folders, recipe), f"hparam={recipe}")
        _check_groups(words, options["mode"], folders)
        raise UserError(
            _explain(error, arguments)
            or f"A config file cannot be composed ({' '.join(str(error).split())}). Correct its keys and its defaults "
            "list, which must not include the file itself."
        ) from None
    for config in checkpoint_configs(arguments, folders):
        cfg |= config
        choices = {group: option for group, option in choices.items() if group not in config}
    for override in overrides:
        key = override.key_or_group
        if override.is_delete() and (override in groups or has_key(cfg, key)):
            raise UserError(f"~{key} removes a key that is read. Leave it out, or set {key} to another value.")
        if override not in groups:
            _check_key(override, cfg, choices, folders)


def _first_option(override: Override, folders: Sequence[Path]) -> str:
    """Return the option of a group, or its list of options, in the first job."""
    lists = [f"[{','.join(map(str, options))}]" for options in lists_of(override)]
    return (lists or _options_of(override, options_in(folders, override.key_or_group)))[0]


def _compose(options: Mapping[str, str], folders: Sequence[Path]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the config composed from these options alone, and the option of each of its groups."""
    further = search_path_override([f"file://{folder.absolute()}" for folder in folders[1:]])
    words = [f"{group}={option}" for group, option in options.items()]
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(folders[0]), version_base="1.3"):
        cfg = to_container(compose("main", [further, *words], return_hydra_config=True))
    return cfg, cfg.pop("hydra")["runtime"]["choices"]


def no_mode(folders: Sequence[Path]) -> NoMode:
    """Return the error of a command line without a mode."""
    modes = ", ".join(options_in(folders, "mode"))
    return NoMode(f"No mode is given. Add mode=NAME. Modes: {modes}. `--help` shows their commands.")


def _check_groups(words: Mapping[str, str], mode: str, folders: Sequence[Path]) -> None:
    """Refuse words, by the group that they set, whose group the mode does not compose."""
    for group, word in words.items():
        modes = modes_with(folders, group)
        if modes and mode not in modes:
            raise UserError(
                f"{word}: mode={mode} does not read the group {group}. Leave it out, or choose a mode that reads it: "
                f"{', '.join(modes)}."
            )


def _check_key(override: Override, cfg: Mapping[str, Any], choices: Mapping[str, str], folders: Sequence[Path]) -> None:
    """Refuse an override whose key a config lacks, or whose value is no table where the config has one.

    Args:
        override: of a key.
        cfg: config of the chosen options alone.
        choices: option of each group.
        folders: of config groups, the shipped one first.
    """
    key = override.key_or_group
    value = override.value()
    word = str(override.input_line)
    adds = override.is_add() or override.is_force_add()
    node = at(cfg, key.split("."))
    if not has_key(cfg, key):
        if not adds and node is None:  # an interpolation above the key may stand for a table
            raise _unknown_key(key, word, cfg, choices, folders)
    elif override.is_add() and node is not None and not isinstance(value, dict | list):
        raise UserError(f"{word}: {key} is a key of the config already. Write {word[1:]}, without +.")
    elif isinstance(node, list) and isinstance(value, Mapping):
        raise UserError(f"{key} is a list. Write it in brackets: {key}=[...].")
    elif isinstance(node, Mapping):
        group = key.replace(".", "/")  # of a nested group, such as data/pixels
        options = [f"{group}={each}" for each in options_in(folders, group)] if group in nested_groups(folders) else []
        keys = [f"{key}.{name}=VALUE" for name in node if not str(name).startswith("_")]
        if not isinstance(value, Mapping) or (options and "name" in value):
            raise UserError(f"{word}: {key} is a group of keys. Set one of them: {join_names(options or keys, 8)}.")
        new = [str(name) for name in value if name not in node]
        if new and options:
            raise _unknown_key(f"{key}.{new[0]}", f"'{word}'", cfg, choices, folders)
        if new and not adds:
            message = f"{key} has no {' or '.join(new)}. To add it, put ++ before the word, in quotes: '++{word}'."
            raise UnknownKey(message, key=f"{key}.{new[0]}")


def _unknown_key(
    key: str, word: str, cfg: Mapping[str, Any], choices: Mapping[str, str], folders: Sequence[Path]
) -> UserError:
    """Return the error of a key that the config lacks: the options that have it, else a near key; see `_check_key`."""
    root = key.partition(".")[0]
    options = options_with(folders, key)
    if root not in cfg:
        options = options or options_with(folders, root)
        if choices["mode"] == "help" and (options or modes_with(folders, root)):
            return no_mode(folders)
        _check_groups({root: word}, choices["mode"], folders)
    if not options:
        known = dict.fromkeys([*keys_of(cfg), *nested_keys(folders)])
        return UnknownKey(f"{key} is not a key of the config.{nearest(key, list(known))} {_ALL_KEYS}", key=key)
    if root in list_groups(folders):
        options = [f"{root}=[{option.partition('=')[2]}]" for option in options]
    chosen = f"{root}={choices[root]}" if root in choices else "the config"
    message = f"{word}: {chosen} lacks this key. Options that have it: {join_names(options, 8)}. Choose one, or leave "
    return UnknownKey(f"{message}the key out.", key=key)


def _explain(error: Exception, arguments: Sequence[str]) -> str:
    """Return the message on an error of Hydra or OmegaConf that no check of words explains; "" for other errors."""
    cause = error.__cause__ if isinstance(error, HydraException) else error
    if isinstance(cause, OmegaConfBaseException):
        names = {word: f"{word.lstrip('+~').partition('=')[0]}." for word in arguments}
        typed = [word for word, name in names.items() if "${" in word or name.startswith(f"{cause.full_key}.")]
        words = " ".join(word.removeprefix("++") for word in typed or arguments)
        if isinstance(cause, ConfigAttributeError | ConfigKeyError):
            return f"{words}: {cause.full_key} is not a key of all chosen options. Leave it out, or choose others."
        return (
            f"{words} is not a valid value, or refers to a key that does not exist. Leave it out, or give a value or "
            "the full name of another key, such as '${seed}'."
        )
    if isinstance(error, HydraException):
        options = [each for each in getattr(error, "options", None) or () if not each.startswith("_")]
        remedy = f"Choose from {', '.join(options)}" if options else "Correct that word or config file"
        return f"{str(error).strip().splitlines()[0].rstrip('.')}. {remedy}."
    return ""
