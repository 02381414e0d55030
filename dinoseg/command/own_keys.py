"""Keys on a command line that only the checkpoint named there has."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hydra.core.override_parser.types import Override, OverrideType

from dinoseg.command.words import assignments, parsed, values_of
from dinoseg.config.plain import has_key


def with_own_keys(arguments: Sequence[str]) -> list[str]:
    """Return a command line with `++` before the keys that the checkpoint of `resume` has in its own config.

    Hydra holds keys against the groups chosen on the command line (head=linear if none is) before anyone has looked at
    the checkpoint; with `++` it takes them as they are, and `resume.merge` sets them in the checkpoint's config. For
    `resume=auto` nothing is changed: its runs have the recipe that the command line composes.

    Raises:
        UserError: `resume` names no checkpoint.
    """
    configs = own_configs(arguments)
    own = {
        place
        for place, override in _overrides(arguments)
        if override.type is OverrideType.CHANGE
        and "." in override.key_or_group  # a group is no key
        and configs
        and all(has_key(config, override.key_or_group) for config in configs)
    }
    return [f"++{word}" if place in own else word for place, word in enumerate(arguments)]


def own_configs(arguments: Sequence[str]) -> list[Mapping[str, Any]]:
    """Return what goes on of the config of each checkpoint that `resume` names: not a group that is chosen anew.

    Raises:
        UserError: there is no such checkpoint.
    """
    given = {override.key_or_group: values_of(override) for _, override in _overrides(arguments)}
    targets = [target for target in given.get("resume", ()) if target not in ("auto", "None")]
    if not targets:
        return []
    from dinoseg.runs.recipe import SAVED  # imports torch
    from dinoseg.training import checkpoint

    found = [checkpoint.describe(checkpoint.find(target, "last")) for target in targets]
    return [
        {
            key: value
            for key, value in info["config"].items()
            if key in SAVED and (key not in given or given[key] == [info["choices"].get(key)])
        }
        for info in found
    ]


def _overrides(arguments: Sequence[str]) -> Iterator[tuple[int, Override]]:
    """Yield place and meaning of the words that Hydra can read."""
    for place, word in assignments(arguments):
        if override := parsed(word):
            yield place, override
