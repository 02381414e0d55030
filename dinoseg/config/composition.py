"""Configs composed from files of config groups, in Hydra's order and at its places, without Hydra's global state.

`compose` returns the config of a job, `compose_options` the keys of some options, such as those of a checkpoint.
"""

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from dinoseg.config import mistakes
from dinoseg.config.expansion import DefaultsEntry, Expansion, merge, read_config, read_entry
from dinoseg.config.options import existing_choices, list_groups
from dinoseg.config.plain import flatten, has_key, is_below, to_container, value_at

SHIPPED = Path(__file__).parents[1] / "cfg"
_SHARED = ("main", "mode/_model", "mode/_recipe")  # files with root keys that need no choice


class Value(NamedTuple):
    """A value that a caller sets in a composed config.

    Attributes:
        key: dotted name of the key.
        value: plain; its mappings are merged into those of the config.
        sign: `+` adds a key, `++` adds or sets one, `~` removes one, and "" sets a key that exists.
        word: as typed on a command line; "": given in Python.
    """

    key: str
    value: Any
    sign: str = ""
    word: str = ""


class Composed(NamedTuple):
    """A composed config with its options and values.

    Attributes:
        cfg: the whole config of a job, with the option of each group as `choices`, further folders as
            `config_dirs`, and without Hydra's keys.
        hydra: Hydra's keys: those that the files set, and the choices as `runtime.choices`.
        options: as given.
        values: as they were set, without mappings whose keys the config has.
    """

    cfg: DictConfig
    hydra: DictConfig
    options: Mapping[str, Any]
    values: Sequence[Value]


def compose(
    options: Mapping[str, Any],
    values: Sequence[Value] = (),
    folders: Sequence[str | Path] = (),
    later: Collection[str] = (),
) -> Composed:
    """Return the config of a job: that of `main.yaml`, of the options of all groups, and of values over it.

    Args:
        options: option of each chosen group, or a list for groups that take one. The names are those of Hydra's
            overrides: `head`, `data/pixels`, `protocol@data.official`, `+GROUP` for a group of the user's own, and
            `~GROUP` to leave a group out.
        values: set in this order. Interpolations in them refer to keys of the config.
        folders: further folders of config groups, searched after the shipped one.
        later: keys whose values, and those below them, are not set, since a checkpoint's config takes them.

    Raises:
        UserError: an option, a group or a key does not exist, or a file is no config file.
    """
    searched = [SHIPPED, *map(Path, folders)]
    lists = list_groups(searched)
    for key, option in options.items():
        # Hydra merges the keys of a list of heads in silence; here only groups whose entry is a list take one
        if isinstance(option, list) and key.lstrip("+~").partition("@")[0] not in lists:
            raise mistakes.not_a_list_group(key, option, searched)
    expansion = Expansion(options, searched)
    # Hydra's own composer changes the global state of the process, which may be a caller's Hydra program; tests compare
    # this order with Hydra's on every recipe and option
    whole = merge(expansion.expand(DefaultsEntry("", "main", package="_global_"), chosen=_additions(options)))
    # an option that no defaults list names would have no effect
    expansion.check_used()
    single = {key: option for key, option in expansion.choices.items() if not isinstance(option, list)}
    whole["hydra"]["runtime"] = {"choices": single, "cwd": os.getcwd()}
    # a checkpoint stores the choices: one of an absent file, such as `local: default`, could not be composed again
    found = existing_choices(expansion.choices, searched)
    choices = {key: option for key, option in found.items() if key not in lists}
    for group in sorted(lists):
        option = expansion.choices.get(group) or []
        choices[group] = [option] if isinstance(option, str) else option
    cfg = OmegaConf.create(whole)
    done = set_values(cfg, values, choices, searched, later)
    keys = {key: value for key, value in to_container(cfg).items() if key != "hydra"}
    job = OmegaConf.create({**keys, "choices": choices, "config_dirs": [str(folder) for folder in folders]})
    given = {value.key for value in done if value.value is not None}
    return Composed(expand_short_forms(job, given), cfg.hydra, options, done)


def compose_options(options: Mapping[str, Any], folders: Sequence[str | Path] = ()) -> dict[str, Any]:
    """Return the keys of `main.yaml` and of some options as plain values, with interpolations unresolved.

    Recipes and `local` are not composed. Without a mode, groups without an option are not composed either.

    Args:
        options: see `compose`; with one of `mode`, all of its groups are composed.
        folders: see `compose`.

    Raises:
        UserError: an option does not exist; the message names it.
    """
    expansion = Expansion(options, [SHIPPED, *map(Path, folders)], is_part=True)
    # a nested group is composed by the option whose defaults list names it
    groups = [group for group in options if not {"@", "/"} & {*group}]
    groups.sort(key=lambda group: group != "mode")  # a checkpoint adds groups to those of a mode
    # the files' own keys alone: which groups belong to the config, the checkpoint says
    shared = [_without_defaults(SHIPPED / f"{name}.yaml") for name in _SHARED]
    return merge([*shared, *(part for group in groups for part in expansion.expand(read_entry({group: None})))])


def expand_short_forms(cfg: DictConfig, given: Collection[str]) -> DictConfig:
    """Return a config with a crop n as [n, n], and without the epochs of a recipe or checkpoint if steps are given.

    Args:
        cfg: of a job.
        given: keys that the caller sets to another value than null.
    """
    changes: dict[str, Any] = {}
    crop = OmegaConf.select(cfg, "resolution.crop")
    # not isinstance: `true` is an int in Python
    if type(crop) is int:
        changes["resolution"] = {"crop": [crop, crop]}
    if "trainer.steps" in given:
        changes["trainer"] = {"epochs": None}
    return OmegaConf.merge(cfg, changes)  # type: ignore[return-value]


def _additions(options: Mapping[str, Any]) -> list[Any]:
    """Return the groups of the user's own, `+GROUP`, as entries of the defaults list of `main.yaml`."""
    return [{key[1:]: option} for key, option in options.items() if key[0] == "+"]


def _without_defaults(path: Path) -> dict[str, Any]:
    content, _ = read_config(path)
    return {key: value for key, value in content.items() if key != "defaults"}


def set_values(
    cfg: DictConfig,
    values: Sequence[Value],
    choices: Mapping[str, Any],
    folders: Sequence[Path],
    later: Collection[str] = (),
) -> list[Value]:
    """Set values of keys that exist in a config, in place, and return them without mappings whose keys it has.

    Args:
        cfg: the config.
        values: see `compose`.
        choices: option of each group.
        folders: of config groups, the shipped one first.
        later: see `compose`.

    Raises:
        UserError: a key does not exist, or cannot take the value.
    """
    plain = to_container(cfg)
    # in struct mode OmegaConf refuses keys that the config lacks; without, a misspelt key would be added
    OmegaConf.set_struct(cfg, True)
    leaves = [leaf for value in values for leaf in _leaves(value, value_at(plain, value.key.split(".")))]
    for key, value, sign, _ in leaves:
        if is_below(key, later):
            continue
        try:
            _set_value(cfg, key, value, sign)
        except (ConfigAttributeError, ConfigKeyError):
            unknown = ((name, each) for name, each in flatten({key: value}) if not has_key(plain, name))
            raise mistakes.unknown_key(*next(unknown, (key, value)), plain, choices, folders) from None
        except (OmegaConfBaseException, ValueError, TypeError) as error:
            raise mistakes.invalid_value(key, value, error) from None
    return leaves


def _leaves(value: Value, node: Any) -> Iterator[Value]:
    """Yield a value, or instead of a mapping given in Python those of its keys, where the config has a mapping."""
    has_names = isinstance(value.value, Mapping) and value.value and all(isinstance(name, str) for name in value.value)
    if value.word or not (has_names and isinstance(node, Mapping)):
        yield value
        return
    for name, each in value.value.items():
        yield from _leaves(value._replace(key=f"{value.key}.{name}", value=each), node.get(name))


def _set_value(cfg: DictConfig, key: str, value: Any, sign: str) -> None:
    if sign == "~":
        above, _, last = key.rpartition(".")
        node: Any = OmegaConf.select(cfg, above) if above else cfg
        with open_dict(node):
            del node[last]
    else:
        OmegaConf.update(cfg, key, value, merge=True, force_add=sign != "")
