"""Recipe names of a command line and the files that hold them: `sarrarp_lora` is `sarrarp/lora`."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from hydra.core.override_parser.types import Glob

from dinoseg.cli.words import assignments, is_sweep, parsed
from dinoseg.config.options import RECIPES, options_of, recipe_name

_OPTION = re.compile(r"[\w./-]+")


def with_recipe_files(arguments: Sequence[str], folders: Sequence[Path]) -> list[str]:
    """Return a command line with recipes as Hydra finds them: with their families, and a sweep's globs expanded.

    Hydra's own globs do not search in families.

    Args:
        arguments: the command line, without the program's name.
        folders: of config groups, including the user's own.
    """
    files = recipe_files(folders)
    words = list(arguments)
    for position, word in assignments(arguments):
        key, sign, value = word.partition("=")
        if key.lstrip("+~") == RECIPES and sign:
            value = _matching(word, files) or value if is_sweep(arguments) else value
            words[position] = f"{key}={_OPTION.sub(lambda option: files.get(option[0], option[0]), value)}"
    return words


def recipe_files(folders: Iterable[Path]) -> dict[str, str]:
    """Return a dict from recipe name to option; a file of that exact name takes precedence over one in a family."""
    options = [option for folder in folders for option in options_of(folder / RECIPES)]
    return {recipe_name(option): option for option in sorted(options, key=lambda option: "/" not in option)}


def _matching(word: str, names: Iterable[str]) -> str:
    """Return the recipe names that a sweep's `glob(...)` matches, comma-separated; "" if no glob matches."""
    override = parsed(word)
    pattern = override.value() if override else None
    if not isinstance(pattern, Glob):
        return ""
    by_name = Glob([recipe_name(text) for text in pattern.include], [recipe_name(text) for text in pattern.exclude])
    return ",".join(by_name.filter(sorted(names)))
