"""The config in a checkpoint: option names of config groups and plain values, and no names of classes to build.

`describe` writes it. `compose_stored` composes the options from the config files of this machine and sets the values.
`docs/security.md` describes the guarantee.
"""

import logging
import re
from collections.abc import Collection, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, MissingMandatoryValue

from dinoseg.config.composition import SHIPPED, compose_options
from dinoseg.config.limits import REMEDY, check_batch, check_values
from dinoseg.config.mistakes import ADD_FOLDER
from dinoseg.config.options import choices_of, list_groups
from dinoseg.config.plain import BUILDS, KeyPath, dotted_name, is_below, nests, texts_of, to_container, value_at
from dinoseg.config.resolvers import CELLS, CLASS_FILE
from dinoseg.utils.errors import UserError
from dinoseg.utils.files import path_exists
from dinoseg.utils.wording import format_override, format_text, join_names

logger = logging.getLogger(__name__)
VALUES_ONLY = "values_only"  # root key of a config: groups that it does not build, whose values alone it holds
_MACHINE_KEYS = ("cache_dir",)
_RUN_INTERPOLATIONS = (f"${{{CLASS_FILE}:", f"${{{CELLS}:")  # interpolations whose value another run cannot know
_GROUP = re.compile(r"\w+(/\w+)*(@\w+(\.\w+)*)?")
_OPTION = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*")  # no part is `..`: a file cannot name options outside the groups
_AT_COMMIT = re.compile(r"(.+)@[0-9a-f]{40}")
_BUILT_IN_WEIGHTS = re.compile(r"random|timm|dinoseg:\w+")


def describe(cfg: DictConfig, keys: Collection[str]) -> dict[str, Any]:
    """Return the parts of a config that a checkpoint stores: `choices`, `config` and `targets`.

    `config` holds every value, resolved, so that a later change of a config file changes no trained model. Left out are
    interpolations of the options themselves, and what belongs to this machine. `targets` are the names of classes by
    place; they are compared, and never built. A group of `VALUES_ONLY` has no targets.

    Args:
        cfg: the whole config of a job.
        keys: root keys to store.

    Raises:
        UserError: a part is not an option of a group, a key of an option was removed, a text holds an interpolation, or
            a number is out of the range that checkpoints may set.
    """
    config = to_container(cfg)
    choices = choices_of(config["choices"], keys)
    given = {key: config[key] for key in keys if key not in config.get(VALUES_ONLY, ())}
    # composed again (2 ms), since Hydra's config does not show which key comes from an option and which from a recipe,
    # and a later use composes the options alone
    options = compose_options(choices_of(choices, given), config.get("config_dirs", ()))
    targets: dict[str, str] = {}
    values = _values_of(cfg, given, options, (), targets, is_argument=False)
    values |= {key: config[key] for key in keys if key not in given}
    check_values(values, "This config", "A run with it could not be resumed: choose another value")
    return {"choices": choices, "config": values, "targets": targets}


def _values_of(
    node: DictConfig,
    given: Mapping[str, Any],
    option: Mapping[str, Any],
    key_path: KeyPath,
    targets: dict[str, str],
    *,
    is_argument: bool,
) -> dict[str, Any]:
    """Return the values to store of a node.

    Args:
        node: of the config.
        given: the same node as plain values, with interpolations unresolved.
        option: the same node as the options of its groups give it.
        key_path: to the node.
        targets: filled with the name of the class of each node.
        is_argument: whether a node above is a component, whose argument this node is.
    """
    is_argument = is_argument or "_target_" in option
    # a later use composes the option, which has the key again: the removal would be lost
    removed = [key for key in option if key not in given and key not in _MACHINE_KEYS] if key_path else []
    if removed:
        key = dotted_name((*key_path, removed[0]))
        raise UserError(f"~{key} removes a key that is read. Leave it out, or set {key} to another value.")
    values: dict[str, Any] = {}
    for key, value in given.items():
        place = (*key_path, str(key))
        usual = option.get(key)
        # what builds an object is compared with the option's, and never stored as a value: a file names no class
        if key in BUILDS or (nests(value) and not _is_node(usual, is_argument=is_argument)):
            if value != usual:
                raise UserError(
                    f"{dotted_name(place)} is a component that no option of a config group names, so a checkpoint "
                    "could not store it. Make it an option: write GROUP/NAME.yaml in a folder, and add --config-dir "
                    "FOLDER and GROUP=NAME."
                )
            if key == "_target_":
                targets[dotted_name(key_path)] = str(value)
        elif key in _MACHINE_KEYS:
            continue
        # below a component any key may be new: it is a parameter of the target, or a key of a table
        elif key_path and key not in option and not is_argument:
            raise UserError(f"{dotted_name(place)} is not a key of the chosen options. Add it to an option's file.")
        elif isinstance(value, Mapping) and _is_node(usual, is_argument=is_argument):
            values[str(key)] = _values_of(node[key], value, usual, place, targets, is_argument=is_argument)
        # interpolations of the option itself are resolved anew, so that `data.root=ELSEWHERE` changes all that refers
        # to it
        elif not (_interpolates(value) and value == usual and not str(value).startswith(_RUN_INTERPOLATIONS)):
            values[str(key)] = _resolve_value(node, key)
    return values


def _is_node(option: Any, *, is_argument: bool) -> TypeGuard[Mapping[str, Any]]:
    """Return whether a node of an option keeps its keys, and their values are stored one by one.

    A mapping without components and interpolations that is an argument of a component, such as a table of ids, is one
    value.
    """
    whole = is_argument and not nests(option) and not any("${" in text for text in texts_of(option))
    return isinstance(option, Mapping) and bool(option) and not whole


def _interpolates(value: Any) -> bool:
    return isinstance(value, str) and "${" in value


def _resolve_value(node: DictConfig, key: Any) -> Any:
    """Return a value as a file stores it; `???` if it is not set or cannot be resolved."""
    try:
        value = node[key]
        return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    except (InterpolationResolutionError, MissingMandatoryValue):
        return "???"


class Source(NamedTuple):
    """Source of a stored config, and what the user allows it.

    Attributes:
        where: name of the file in errors.
        folders: further folders of config groups.
        trust: hub ids that weights may come from.
        typed: keys that the command line sets instead of the file.
    """

    where: str
    folders: Sequence[str | Path] = ()
    trust: Collection[str] = ()
    typed: Collection[str] = ()


def compose_stored(
    description: Mapping[str, Any], source: Source, *, unused: Collection[str] = (), replaced: Collection[str] = ()
) -> dict[str, Any]:
    """Return the config that a description stores, as plain values with unresolved interpolations of the options.

    Args:
        description: `choices`, `config` and `targets`, as `describe` returns them; not trusted.
        source: of the description.
        unused: root keys whose options are not composed; their values alone are returned, without other root keys that
            only these options have.
        replaced: keys that keep the values of their options, since the caller sets others.

    Raises:
        UserError: an option does not exist here or is another class, or a value does not fit into its option or is out
            of bounds. The message names it.
    """
    where, stored = source.where, description["config"]
    # before anything is composed: the file may come from a stranger, and values are bounded where they enter
    check_values(stored, where, REMEDY)
    used = [key for key in stored if key not in unused]
    composed = _compose(description["choices"], used, source)
    if unused:  # without the root keys of options that are not composed, such as `teacher` of trainer=distil
        used = [key for key in used if key in composed or choices_of(description["choices"], [key])]
    # an option of the same name may be another class here, which would train or predict something else in silence
    _check_targets(description["targets"], composed, where)
    weights = value_at(composed, ("backbone", "weights"))
    added: list[str] = []
    _set_values(composed, {key: stored[key] for key in used}, (), added, where, replaced, is_argument=False)
    if added:
        logger.warning("%s: it has no value of %s. The defaults of the options are used.", where, join_names(added))
    composed |= {key: _plain_group(stored[key]) for key in stored if key in unused}
    # weights that the file alone names would be downloaded from wherever it says
    if "backbone" in used and "backbone.weights" not in source.typed:
        _check_weights(value_at(composed, ("backbone", "weights")), weights, source)
    check_batch(OmegaConf.create(composed), where)
    return composed


def _compose(choices: Mapping[str, Any], keys: Collection[str], source: Source) -> dict[str, Any]:
    """Return the options that fill some root keys, and root keys of their own, after a check of their names."""
    chosen = choices_of(choices, keys)
    listed = list_groups([SHIPPED, *map(Path, source.folders)])
    for group, option in chosen.items():
        names = option if group in listed and isinstance(option, list) else [option]
        if not (_GROUP.fullmatch(group) and all(isinstance(name, str) and _OPTION.fullmatch(name) for name in names)):
            raise UserError(
                f"{source.where}: {format_text(f'{group}={option}')} is not the name of an option. {REMEDY}."
            )
    try:
        composed = compose_options(chosen, source.folders)
    except UserError as error:
        raise UserError(f"{source.where}: {error}") from None
    groups = {path.name for folder in (SHIPPED, *source.folders) for path in Path(folder).glob("*/")}
    others = {*groups, *compose_options({}, ())}  # groups that an option brings, and root keys without any option
    return {key: value for key, value in composed.items() if key in keys or key not in others}


def description_of(config: Mapping[str, Any], keys: Collection[str], source: Source) -> dict[str, Any]:
    """Return the description of some root keys of a config file that a job has written; it is not trusted.

    Args:
        config: the file's content, with `choices`, names of classes, and interpolations of its options.
        keys: root keys to describe.
        source: of the file.
    """
    choices, targets = choices_of(config["choices"], keys), dict[str, str]()
    options = _compose(choices, keys, source)
    values = {key: config[key] for key in keys}
    return {"choices": choices, "config": _without_parts(values, options, (), targets), "targets": targets}


def _without_parts(given: Mapping[str, Any], option: Any, key_path: KeyPath, targets: dict[str, str]) -> dict[str, Any]:
    """Return the values of a node without the interpolations of its option, and fill `targets` with class names."""
    values: dict[str, Any] = {}
    for key, value in given.items():
        usual = option.get(key) if isinstance(option, Mapping) else None
        if key == "_target_":
            targets[dotted_name(key_path)] = str(value)
        elif isinstance(value, Mapping):
            values[str(key)] = _without_parts(value, usual, (*key_path, str(key)), targets)
        elif key not in _MACHINE_KEYS and not (value == usual and (key in BUILDS or _interpolates(value))):
            values[str(key)] = value
    return values


def _plain_group(values: Any) -> dict[str, Any]:
    """Return the values of a group without its option; the number of classes is an interpolation of options of data."""
    classes = values.get("classes")
    return {**values, "num_classes": len(classes)} if isinstance(classes, list) else dict(values)


def _check_targets(targets: Mapping[str, str], composed: Mapping[str, Any], where: str) -> None:
    """Refuse options that are another class on this machine than where the checkpoint was written."""
    for place, target in targets.items():
        keys = place.split(".")
        here = value_at(composed, keys)
        if keys[0] in composed and (not isinstance(here, Mapping) or here.get("_target_") != target):
            here = here.get("_target_") if isinstance(here, Mapping) else None
            raise UserError(
                f"{where}: its {format_text(place)} is {format_text(target)}, and config files on this machine name "
                f"{here or 'no class'} there. {ADD_FOLDER}"
            )


def _set_values(
    node: MutableMapping[str, Any],
    values: Mapping[str, Any],
    key_path: KeyPath,
    added: list[str],
    where: str,
    replaced: Collection[str],
    *,
    is_argument: bool,
) -> None:
    """Set values in a composed node: those of keys that it has, and any argument of a component.

    Args:
        node: of the composed options.
        values: to set.
        key_path: to the node.
        added: filled with the keys of the node that the values lack.
        where: name of the file in errors.
        replaced: see `compose_stored`.
        is_argument: whether a node above is a component, whose argument this node is.
    """
    is_argument = is_argument or "_target_" in node
    names = {str(key): key for key in node}
    for key, value in values.items():
        place = (*key_path, key)
        name = names.get(key, key)
        option = node.get(name)
        is_group = _is_node(option, is_argument=is_argument)
        is_known = (name in node or is_argument) and key not in _MACHINE_KEYS
        if is_group and isinstance(value, Mapping):
            _set_values(node[name], value, place, added, where, replaced, is_argument=is_argument)
        # a file may set values, but change no form: it adds no key to a group, and replaces no component
        elif not is_known or (value is not None and (is_group or nests(option))):
            what = f"{where}: {dotted_name(place)}={format_text(format_override(value))}"
            raise UserError(f"{what} is refused: the options on this machine have another form. {REMEDY}.")
        elif not _is_replaced(dotted_name(place), value, replaced):
            node[name] = value
    for key, option in node.items():
        is_fixed = key in (*BUILDS, *_MACHINE_KEYS) or _interpolates(option) or nests(option)
        # a key that the option got after the file was written: its default applies, and the log says so
        if str(key) not in values and not is_fixed and key_path:
            added.append(dotted_name((*key_path, str(key))))


def _is_replaced(key: str, value: Any, replaced: Collection[str]) -> bool:
    """Return whether another value replaces one, or one below it where it has no keys."""
    return key in replaced or (value is None and any(is_below(name, [key]) for name in replaced))


def _check_weights(weights: Any, usual: Any, source: Source) -> None:
    """Refuse weights from a place that only the file names, since they would be downloaded."""
    text = str(weights)
    at_commit = _AT_COMMIT.fullmatch(text)
    name = at_commit[1] if at_commit else text
    is_named = name == usual or not {name, text}.isdisjoint(source.trust) or _BUILT_IN_WEIGHTS.fullmatch(text)
    if weights is not None and not is_named and not path_exists(text):
        raise UserError(
            f"{source.where}: its config sets backbone.weights={format_text(text)}, which is neither a file nor a "
            "folder on this machine, and its option does not name it, so nothing is downloaded. Set its current path: "
            f"backbone.weights=PATH. Or allow this source: trust=[{format_text(text)}]."
        )
