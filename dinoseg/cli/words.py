"""Words of a command line: which are KEY=VALUE overrides, and which values need quotes because they are text."""

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Glob, IntervalSweep, Override, Quote, QuotedString
from hydra.errors import HydraException

from dinoseg.config.grammar import write_value
from dinoseg.utils.errors import UserError
from dinoseg.utils.files import path_exists

FILES = {  # keys whose values are paths
    *("resume", "input", "labels", "reference", "prediction", "cache_dir", "data.root"),
    *("mode.input", "mode.labels", "mode.reference", "mode.prediction", "mode.restart"),
    *("backbone.weights", "head.weights", "hydra.run.dir", "hydra.sweep.dir", "hydra.sweeper.storage"),
}
_FLAGS = ("-m", "--multirun", "--resolve", "--run", "-r", "--version", "--hydra-help", "--shell-completion", "-sc")
_TAKES_A_VALUE = (
    *("--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn"),
    *("--config-dir", "-cd", "--info", "-i", "--experimental-rerun"),
)
_NOT_IN_SWEEPS = ("--cfg", "-c", "--info", "-i", "--run", "-r", "--shell-completion", "-sc")  # Hydra refuses them
_NESTED = ("[", "{", "'", '"')  # first characters of values that are more than text


def assignments(arguments: Sequence[str]) -> Iterator[tuple[int, str]]:
    """Yield position and text of the words meant as KEY=VALUE: neither flags nor values of flags."""
    skip = False
    for position, word in enumerate(arguments):
        if not skip and not word.startswith("-"):
            yield position, word
        skip = word in _TAKES_A_VALUE


def flags_last(arguments: Sequence[str]) -> list[str]:
    """Return a command line with flags after the overrides: Hydra does not find overrides on both sides of a flag."""
    words = dict(assignments(arguments))
    return [*words.values(), *(word for position, word in enumerate(arguments) if position not in words)]


def as_text(arguments: Sequence[str]) -> list[str]:
    """Return a command line with quotes around values that Hydra's grammar would split or could not parse.

    Paths are text, whatever characters they contain. Any other value is text only if it cannot be anything else.

    Args:
        arguments: the command line, without the program's name.

    Raises:
        UserError: an unknown flag, or one that does not go with -m.
    """
    for word in arguments:
        flag = word.split("=")[0]
        if flag.startswith("-") and flag not in (*_FLAGS, *_TAKES_A_VALUE):
            raise UserError(
                f"{word} is not a flag. The flags are --help, -m for several runs, and --cfg job to print the config; "
                "write keys as KEY=VALUE, without dashes."
            )
    several = is_sweep(arguments)
    for word in arguments if several else ():
        if word.split("=")[0] in _NOT_IN_SWEEPS:
            raise UserError(f"{word} is for one run. Leave -m out, and give one value for each key, as one job has it.")
    words = list(arguments)
    for position, word in assignments(arguments):
        key, _, value = word.partition("=")
        if not value or key.startswith("~"):
            continue
        override = parse_word(word)
        is_text = override is None and not value.startswith(_NESTED)
        if is_text or _names_file(key, value, override, several=several):
            words[position] = f"{key}={QuotedString(value, Quote.double).with_quotes()}"
    return words


def is_sweep(arguments: Sequence[str]) -> bool:
    """Return whether a command line requests several runs."""
    return bool({"-m", "--multirun"} & set(arguments))


@lru_cache(maxsize=1024)  # each word is parsed about six times per launch, 1 ms each
def parse_word(word: str) -> Override | None:
    """Return a word as parsed by Hydra (cached: do not modify it); None if Hydra cannot parse it."""
    try:
        return OverridesParser.create().parse_override(word)
    except (HydraException, ValueError):  # ValueError: a number with more digits than Python parses
        return None


def values_of(override: Override) -> list[str]:
    """Return an override's values as text, one for each run of a sweep; a glob or an interval as typed."""
    if isinstance(override.value(), Glob | IntervalSweep):
        return [str(override.input_line).partition("=")[2]]
    if not override.is_sweep_override():
        value = override.value()
        return [value if isinstance(value, str) else write_value(value)]
    return [value.text if isinstance(value, QuotedString) else str(value) for value in override.sweep_iterator()]


def lists_of(override: Override) -> list[list[Any]]:
    """Return the values of an override as lists, one for each run of a sweep; none if no run's value is a list."""
    value = override.value()
    values = value.list if isinstance(value, ChoiceSweep) else [value]
    is_listed = any(isinstance(each, list) for each in values)
    return [each if isinstance(each, list) else [each] for each in values] if is_listed else []


def options_of(override: Override, known: Sequence[str]) -> list[str]:
    """Return the options that an override of a group names; a glob without matches is returned as it was typed.

    Args:
        override: of a group.
        known: all options of the group.
    """
    value = override.value()
    matches: list[str] = value.filter(list(known)) if isinstance(value, Glob) else []
    return matches or [str(option) for each in lists_of(override) or [values_of(override)] for option in each]


def _names_file(key: str, value: str, override: Override | None, *, several: bool) -> bool:
    """Return whether a value is a path as it stands: neither a list of paths nor text in quotes."""
    if key.lstrip("+") not in FILES or value == "null":
        return False
    exists = path_exists(value)
    if override is None:
        return exists or not (value.startswith(_NESTED) and value.endswith(("]", "}", "'", '"')))
    if override.is_sweep_override():
        return exists or not several
    more = isinstance(override.value(), list | dict) or "${" in value or re.fullmatch(r"'.*'|\".*\"", value)
    return override.value() != value and (exists or not more)
