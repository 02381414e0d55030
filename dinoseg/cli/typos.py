"""Checks of a command line: its words alone, then its keys in the composed config; errors of Hydra and its plug-ins."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from traceback import walk_tb
from typing import Any

from hydra.core.override_parser.types import ChoiceSweep, Override
from hydra.errors import HydraException
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from dinoseg.cli.checkpoint_keys import checkpoint_keys
from dinoseg.cli.words import assignments, is_sweep, lists_of, options_of, parse_word
from dinoseg.config.composition import Value, compose
from dinoseg.config.grammar import write_value
from dinoseg.config.job import SEARCH_PATH, read_words
from dinoseg.config.mistakes import not_a_list_group, unknown_option
from dinoseg.config.options import is_group, list_groups, nested_groups, options_in
from dinoseg.config.plain import has_key, to_container, value_at
from dinoseg.utils.errors import UserError
from dinoseg.utils.wording import join_names, suggest_nearest

_INSTALLED_BY = {
    "hydra/launcher": {
        "joblib": ".[joblib]",
        "submitit_local": ".[submitit]",
        "submitit_slurm": ".[submitit]",
        "ray": "hydra-ray-launcher",  # no extra: its cloudpickle below 3 would pin everybody in one lock file
    },
    "hydra/sweeper": {"optuna": ".[optuna]"},
}
_COLOURS = re.compile("\x1b\\[[0-9;]*m")
_LAUNCHER = re.compile(r"hydra_plugins\.\w+_launcher\.")  # modules of launchers, as Hydra's plug-ins are named


@contextmanager
def explain_errors(arguments: Sequence[str], folders: Sequence[Path]) -> Iterator[None]:
    """Refuse words that cannot be composed, once composing or running them has failed.

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
        of_torch = isinstance(error, RuntimeError | MemoryError) and not isinstance(error, RecursionError)
        if not of_torch:
            _compose_again(arguments, folders)
        message = explain_plugin_error(arguments, error) or _explain(error, arguments)
        if not message:
            raise
        raise UserError(message) from error


def check_words(arguments: Sequence[str], folders: Sequence[Path]) -> None:
    """Refuse words that are not KEY=VALUE, unknown options of groups, and several values that no or one run takes.

    Args:
        arguments: the command line, without the program's name.
        folders: of config groups, the shipped one first.

    Raises:
        UserError: naming the word and its fix.
    """
    several = is_sweep(arguments)
    words = [word for _, word in assignments(arguments)]
    has_more_folders = any(word.startswith(f"{SEARCH_PATH}=") for word in words)  # whose options only Hydra finds
    swept: dict[str, str] = {}  # words with several values, by key
    for position, word in enumerate(words):
        override = parse_word(word)
        if override is None:
            raise UserError(_explain_unparsed(word, words[position + 1 :], folders))
        key = override.get_key_element().lstrip("+")
        if override.is_sweep_override() and not several:
            raise UserError(
                f"{word} gives several values. For a list use brackets: '{key}=[{word.partition('=')[2]}]'. A run "
                "with each of them needs -m, or a loop in Python."
            )
        if key in swept:
            raise UserError(f"{swept[key]} and {word} set the same key, and a sweep runs only the last. Give one.")
        if override.is_sweep_override():
            swept[key] = word
            _check_distinct_values(override, word)
        for source in chain(*lists_of(override)) if key == SEARCH_PATH else ():
            if not _is_source(str(source)):
                raise UserError(f"{word}: {source} is not found. Give a folder as file://FOLDER, or as pkg://PACKAGE.")
        if _is_group(override, folders) and not (override.is_delete() or has_more_folders):
            _check_options(override, folders)


def _check_distinct_values(override: Override, word: str) -> None:
    """Refuse a value that a sweep gives twice: the runs are equal, and would count as two seeds in its intervals."""
    sweep = override.value()
    values = [repr(value) for value in sweep.list] if isinstance(sweep, ChoiceSweep) else []
    if len({*values}) < len(values):
        raise UserError(
            f"{word} gives a value twice, and runs of equal settings are equal. Give each value once; to repeat a "
            "training, sweep seed=1,2."
        )


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
        question = suggest_nearest(word, options_in(folders, "mode"), "mode=")
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
    return is_option and is_group(folders, override.key_or_group)


def _check_options(override: Override, folders: Sequence[Path]) -> None:
    """Refuse options without a file, and a list for a group that takes one option, whose keys Hydra would merge."""
    group = override.key_or_group
    lists = lists_of(override)
    if lists and group not in list_groups(folders):
        raise not_a_list_group(group, lists[0], folders)
    for option in options_of(override, options_in(folders, group)):
        if not any(os.path.isfile(folder / group / f"{option}.yaml") for folder in folders):
            raise unknown_option(group, option, folders)


def _compose_again(arguments: Sequence[str], folders: Sequence[Path]) -> None:
    """Refuse words whose group, key or kind of value does not fit the config of the chosen options.

    Of a sweep, the first job is composed. Keys of checkpoints are left to the job.
    """
    words = [_first_job(word, folders) for _, word in assignments(arguments)]
    ours = [word for word in words if not word.lstrip("+~").startswith(("hydra/", "hydra.")) or SEARCH_PATH in word]
    options, values, more = read_words([word for word in ours if parse_word(word)], folders)
    further = [*folders[1:], *more]
    config = to_container(compose(options, (), further).cfg)
    for value in values:
        _check_kind(value, config, folders)
    compose(options, values, further, checkpoint_keys(arguments, folders))


def _first_job(word: str, folders: Sequence[Path]) -> str:
    """Return a word of a sweep as its first job has it; others unchanged."""
    override = parse_word(word)
    if override is None or not override.is_sweep_override():
        return word
    first = next(iter(lists_of(override)), None)
    known = options_in(folders, override.key_or_group)
    return f"{override.get_key_element()}={write_value(first or options_of(override, known)[0])}"


def _check_kind(value: Value, config: Mapping[str, Any], folders: Sequence[Path]) -> None:
    """Refuse one value for a group of keys, and a removed key."""
    if value.sign == "~" and has_key(config, value.key):
        raise UserError(f"~{value.key} removes a key that is read. Leave it out, or set it to another value.")
    node = value_at(config, value.key.split("."))
    group = value.key.replace(".", "/")  # of a nested group, such as data/pixels
    options = [f"{group}={each}" for each in options_in(folders, group)] if group in nested_groups(folders) else []
    is_table = isinstance(value.value, Mapping) and not (options and "name" in value.value)
    if isinstance(node, Mapping) and not is_table and value.value is not None:
        keys = [f"{value.key}.{name}=VALUE" for name in node if not str(name).startswith("_")]
        known = join_names(options or keys, 8)
        raise UserError(f"{value.word}: {value.key} is a group of keys. Set one of them: {known}.")


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


def explain_plugin_error(arguments: Sequence[str], error: Exception) -> str:
    """Return the message on an error of Hydra's launchers, or on a package that they miss; "" for other errors.

    Args:
        arguments: the command line, without the program's name.
        error: raised while Hydra ran the command line.
    """
    return _find_missing_package(arguments, error) or _explain_launcher(arguments, error)


def _explain_launcher(arguments: Sequence[str], error: Exception) -> str:
    """Return which launcher raised an error, and the error in one line; "" if none did."""
    modules = (frame.f_globals.get("__name__", "") for frame, _ in walk_tb(error.__traceback__))
    plugin = next((name.split(".")[1] for name in modules if _LAUNCHER.match(name)), None)
    if plugin is None:
        return ""
    typed = [word for _, word in assignments(arguments) if word.startswith("hydra/launcher=")]
    text = _COLOURS.sub("", str(error))
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [""]
    cause = lines[0] if len(lines) == 1 else f"{lines[0]} ... {lines[-1]}"
    return (
        f"{typed[0] if typed else plugin} failed ({type(error).__name__}: {cause}). Check the keys of hydra.launcher, "
        "and that its cluster runs and accepts jobs. Jobs that have ended keep their run folders."
    )


def _find_missing_package(arguments: Sequence[str], error: Exception) -> str:
    """Return which override needs a package that is not installed, and how to install it; "" if none does.

    Args:
        arguments: the command line, without the program's name.
        error: raised by Hydra when it created its launcher or sweeper.
    """
    unknown = isinstance(error, RuntimeError) and "Unknown plugin class" in str(error)
    if not unknown and not isinstance(error, ImportError):
        return ""
    for _, word in assignments(arguments):
        group, _, option = word.partition("=")
        if package := _INSTALLED_BY.get(group, {}).get(option):
            message = str(error).split("\n")[0]
            location = "in your clone of dinoseg, " if package.startswith(".") else ""
            return f"{word} needs a package that is not installed ({message}): {location}pip install '{package}'"
    return ""
