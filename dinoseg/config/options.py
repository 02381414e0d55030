"""The options of config groups, which are files; a family of options is a folder of them."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

RECIPES = "hparam"  # the group whose options have families


def config_folders(arguments: Sequence[str], shipped: Path) -> list[Path]:
    """Return the folders of config groups: the shipped one, and that of the user's own which `--config-dir` names."""
    flags = ("--config-dir", "-cd")
    named = [value for flag, value in pairwise(arguments) if flag in flags]
    named += [word.partition("=")[2] for word in arguments if word.partition("=")[0] in flags and "=" in word]
    return [shipped, *map(Path, named)]


def options_of(group: Path) -> list[str]:
    """Return the options that a group's folder holds, of a family as `family/option`."""
    names = (path.relative_to(group).with_suffix("") for path in group.rglob("*.yaml"))
    return sorted(name.as_posix() for name in names if not name.name.startswith("_"))


def recipe_name(option: str) -> str:
    """Return the name of a recipe, by which its runs and checkpoints know it, whatever family its file is in."""
    return option.replace("/", "_")


def chosen_options(choices: Mapping[str, Any]) -> dict[str, Any]:
    """Return group to option, as a run's config holds them.

    Args:
        choices: hydra's, which also has options of groups that only files choose.
    """
    chosen = {group: option for group, option in choices.items() if "/" not in group}
    return {group: recipe_name(str(option)) if group == RECIPES else option for group, option in chosen.items()}
