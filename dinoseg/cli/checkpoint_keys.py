"""The root config for Hydra, which accepts typed keys that only a checkpoint or a swept option may have."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.types import Override, OverrideType
from omegaconf import DictConfig, OmegaConf

from dinoseg.cli.words import assignments, is_sweep, lists_of, options_of, parse_word, values_of
from dinoseg.config.options import groups_of, is_group, options_in, options_with
from dinoseg.config.plain import flatten, is_below
from dinoseg.training.description import SAVED

_MAIN = "main"
_WITH_KEYS = "main_with_typed_keys"


def root_config(arguments: Sequence[str], folders: Sequence[Path]) -> str:
    """Return the name of the root config for Hydra: `main`, or one that accepts more typed keys.

    Hydra checks keys in the options of the command line (head=linear by default). The other config opens the groups of
    keys that a checkpoint may have. For a sweep it chooses each group as the first job does, since Hydra checks keys
    without any swept word before it composes the jobs. It is in Hydra's store, which launchers copy to their processes,
    so that words and records stay as typed.

    Args:
        arguments: the command line, without the program's name.
        folders: of config groups, the shipped one first.
    """
    of_checkpoints = checkpoint_keys(arguments, folders)
    swept = _first_options(arguments, folders) if is_sweep(arguments) else {}
    return _store_config(arguments, folders, of_checkpoints, swept) if of_checkpoints or swept else _MAIN


def _first_options(arguments: Sequence[str], folders: Sequence[Path]) -> dict[str, str]:
    """Return the option of each swept group in the first job; none of groups that take lists.

    A word with an empty list would not replace the options of the root config in a later job.
    """
    return {
        override.get_key_element(): options_of(override, options_in(folders, override.key_or_group))[0]
        for override in _overrides(arguments)
        if override.type is OverrideType.CHANGE
        and override.is_sweep_override()
        and is_group(folders, override.key_or_group)
        and not lists_of(override)
    }


def checkpoint_keys(arguments: Sequence[str], folders: Sequence[Path]) -> Collection[str]:
    """Return keys, also of all keys below them, that jobs find in the checkpoint in `resume` or `mode.model` alone.

    They are none with `resume=auto`: it looks for runs of the recipe that the command line composes.

    Args:
        arguments: the command line, without the program's name.
        folders: of config groups, the shipped one first.
    """
    typed = {override.key_or_group: values_of(override) for override in _overrides(arguments)}
    runs = typed.get("resume", [])
    if not (runs or "mode.model" in typed) or {"auto", "null"} & {*runs}:
        return ()
    return _keys_of_modes(typed.get("mode", []), folders, has_runs=bool(runs))


def _keys_of_modes(modes: Sequence[str], folders: Sequence[Path], *, has_runs: bool) -> Collection[str]:
    """Return the root keys that modes take from a run; of a model in one file, the keys of its weights."""
    if not {f"mode={mode}" for mode in modes} <= {*options_with(folders, "mode.resume_from")}:
        return ()
    if not has_runs:
        return ("backbone.weights", "head.weights")
    if not modes:  # a config file may choose one
        return SAVED
    read = {group for mode in modes for group in groups_of(folders, mode)}
    return [key for key in SAVED if key in read or "trainer" in read]


def _store_config(
    arguments: Sequence[str], folders: Sequence[Path], of_checkpoints: Collection[str], swept: Mapping[str, str]
) -> str:
    """Store a root config that accepts the typed keys among some, with options of `swept` groups; return its name."""
    nodes: dict[str, DictConfig | None] = {}
    for key in _set_keys(arguments, folders):
        root, _, below = key.partition(".")
        if is_below(key, of_checkpoints):
            # its own flag counts when Hydra closes the whole config to new keys
            nodes[root] = DictConfig({}, flags={"struct": False}) if below else None
    chosen = [{f"override /{group}": option} for group, option in swept.items()]
    ConfigStore.instance().store(_WITH_KEYS, OmegaConf.create({"defaults": [_MAIN, "_self_", *chosen], **nodes}))
    return _WITH_KEYS


def _set_keys(arguments: Sequence[str], folders: Sequence[Path]) -> Iterator[str]:
    """Yield the keys that words set, those in mappings included."""
    for override in _overrides(arguments):
        key, value = override.key_or_group, override.value()
        if override.type is OverrideType.CHANGE and (isinstance(value, dict) or not is_group(folders, key)):
            yield from (name for name, _ in flatten({key: value}))


def _overrides(arguments: Sequence[str]) -> Iterator[Override]:
    """Yield the parsed form of the words that Hydra can parse."""
    return (override for _, word in assignments(arguments) if (override := parse_word(word)))
