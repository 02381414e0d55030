"""Instantiation of config nodes, checked against the signatures of their targets; imports no torch.

Here is the only call of hydra's `instantiate`.
"""

import inspect
import pkgutil
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from hydra.errors import InstantiationException
from hydra.utils import instantiate as hydra_instantiate
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dinoseg.config.plain import KeyPath, dotted_name, texts_of, walk
from dinoseg.utils.errors import KeyNotSet, UserError, name_parameters
from dinoseg.utils.ranges import check_value
from dinoseg.utils.wording import format_text, format_value

Part = TypeVar("Part")
_TRUSTED = ("dinoseg.", "torch.nn.", "torch.optim.")  # packages whose targets are imported and inspected
_SELECTED = re.compile(r"\$\{oc\.select:([\w.]+),")  # `${oc.select:KEY,DEFAULT}`, which is no node of its key


def instantiate(node: Any, *, exclude: Sequence[str] = (), overrides: Mapping[str, Any] | None = None) -> Any:
    """Instantiate a config node; a `_partial_` node gives a callable that takes the remaining arguments.

    Parts name their parameters in errors. Here, and in a call of a `_partial_` node, these become full keys.

    Args:
        node: a config node or a dict, with `_target_`.
        exclude: keys of the node that other code reads.
        overrides: values that override the node's own.

    Raises:
        UserError: a value is missing, the target cannot be imported, or it does not take a key or its value.
    """
    try:
        values: Any = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    except UserError as error:
        raise _plain_error(error) from None
    except OmegaConfBaseException as error:
        key = _missing_key(error)
        if key is None:
            raise
        raise _unset_error(node, key) from None
    where = node._get_full_key(None) if OmegaConf.is_config(node) else ""
    if not isinstance(values, Mapping):
        raise UserError(f"{where or format_text(str(node))} has no `_target_`, which this config node needs. Set it.")
    keys = argument_keys(node)
    values = {key: value for key, value in values.items() if key not in exclude} | dict(overrides or {})
    unset = next((key_path for key_path, value in walk(values) if value == "???"), None)
    if unset:
        raise not_set(_full_key(node, unset))
    # hydra would resolve the text again, and so run it
    pointer = next((text for text in texts_of(values) if "${" in text), None)
    if pointer is not None:
        raise UserError(f"{pointer} is still an interpolation after it is resolved. Choose a value without ${{.")
    # checked before anything is built: the constructor of an outer part would fail after its inner ones were built
    for key_path, table in walk(values):
        if isinstance(table, Mapping) and "_target_" in table:
            arguments = {key: value for key, value in table.items() if not str(key).startswith("_")}
            names = {key: _full_key(node, (*key_path, key)) for key in arguments}
            check_arguments(table["_target_"], arguments, names)
    part = _call_target(values, where, keys)
    if not isinstance(part, partial):
        return part
    # a `partial` that names full keys in its errors, when it is called with the rest later
    factory = Factory(part.func, *part.args, **part.keywords)
    factory.keys = keys
    return factory


def check_arguments(target: str, arguments: Mapping[str, Any], names: Mapping[str, str] | None = None) -> None:
    """Refuse keys that a target does not take, and values that its annotations do not allow.

    Args:
        target: a dotted path; targets outside the trusted packages are not checked.
        arguments: its keyword arguments.
        names: full config keys of these arguments, for messages; an argument without one appears by its own name.

    Raises:
        UserError: naming the key and what the target takes.
    """
    try:
        part = pkgutil.resolve_name(target) if target.startswith(_TRUSTED) else None
    except (ImportError, AttributeError, ValueError):  # hydra's own error names the module that is missing
        part = None
    if part is None:
        return
    parameters = inspect.signature(part).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    unknown = [str(key) for key in arguments if key not in parameters]
    if unknown and not takes_any:
        raise UserError(f"{target} does not take {', '.join(unknown)}. It takes: {', '.join(parameters)}.")
    with name_parameters(names or {}):
        for key, value in arguments.items():
            if key in parameters:
                check_value(key, value, parameters[key].annotation)


def argument_keys(node: Any) -> dict[str, str]:
    """Return the full key that sets each argument of a config node, and as `PART.ARGUMENT` those in its tables."""
    values = OmegaConf.to_container(node) if OmegaConf.is_config(node) else node
    arguments = [key_path for key_path, _ in walk(values) if key_path and not str(key_path[-1]).startswith("_")]
    return {dotted_name(key_path): _full_key(node, key_path) for key_path in arguments}


class Factory(partial[Any]):
    """Callable of a `_partial_` node, whose errors name config keys instead of parameters."""

    keys: Mapping[str, str]  # parameters to the full keys that set them

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        """Call the target with the node's values and further arguments."""
        with name_parameters(self.keys):
            return super().__call__(*args, **kwargs)


def _call_target(values: Mapping[str, Any], where: str, keys: Mapping[str, str]) -> Any:
    """Return what the target of a node returns; `keys` are its `argument_keys`, `where` is its full key."""
    try:
        return hydra_instantiate(values, _convert_="all")
    except InstantiationException as error:
        if isinstance(error.__cause__, ImportError) and str(error).startswith("Error locating target"):
            raise UserError(
                f"{where}: its `_target_` cannot be imported ({error.__cause__}). Correct it in the YAML file, or add "
                "the folder of your package to PYTHONPATH."
            ) from error
        place = re.search(r"\nfull_key: (\S+)$", str(error))  # of a part within the node
        if place and re.search(r"missing (\d+|a) required", str(error.__cause__)):
            raise UserError(
                f"{where}.{place[1]} cannot be built ({error.__cause__}). Set `_partial_: true` there if dinoseg "
                "passes these arguments later, else set them."
            ) from error
        part = f"{place[1]}." if place else "."
        inner = {name.removeprefix(part): keys[name] for name in keys if name.startswith(part)}
        with name_parameters({**keys, **inner}):
            raise (error.__cause__ or error) from None  # the target's own error, without hydra's wrapper


def _full_key(node: Any, key_path: KeyPath) -> str:
    """Return the full key that sets a value below a node; for an interpolation, the key it points to."""
    name = node._get_full_key(None) if OmegaConf.is_config(node) else ""
    for step in key_path:
        name = f"{name}.{step}".lstrip(".")
        # a longer list has replaced the node's
        has_more = OmegaConf.is_list(node) and isinstance(step, int) and step >= len(node)
        node = node._get_node(step) if OmegaConf.is_config(node) and not has_more else None
        if node is not None and node._is_interpolation():
            selected = _SELECTED.match(str(node._value()))
            name = selected[1] if selected else name
            node = None if selected else node._maybe_dereference_node()
        name = (node is not None and node._get_full_key(None)) or name
    return name


def expect_type(contract: type[Part], part: object, key: str) -> Part:
    """Return `part` if it is an instance of `contract`.

    Raises:
        UserError: it is not, naming the class to inherit from.
    """
    if not isinstance(part, contract):
        raise UserError(
            f"{key}: {format_value(part)} is not an object of {contract.__module__}.{contract.__name__}. Inherit "
            "from that class; a YAML file with `_partial_: true` gives no object, so remove that line."
        )
    return part


def check_partial(node: Mapping[str, Any], key: str) -> None:
    """Refuse a node that cannot be completed by arguments which are known at run time only.

    Raises:
        UserError: it lacks `_target_`, or `_partial_: true`.
    """
    if "_target_" not in node or not node.get("_partial_"):
        raise UserError(
            f"{key}: its YAML file must set `_target_: package.module.Class` and `_partial_: true`, since arguments "
            "such as the backbone's width are known at run time only."
        )


@contextmanager
def type_errors_as_user_errors(name: str, remedy: str) -> Iterator[None]:
    """Turn a TypeError of a target, called with arguments that it does not take, into a UserError with a remedy."""
    try:
        yield
    except TypeError as error:
        raise UserError(f"{name} cannot be instantiated ({error}). {remedy}") from error


def _missing_key(error: OmegaConfBaseException) -> str | None:
    """Return the key without a value to which an interpolation refers; OmegaConf has it only in the text."""
    found = re.search(r"Missing mandatory value: (\S+)", str(error))
    return found and found[1]


def _unset_error(node: Any, key: str) -> UserError:
    """Return the error of a key without a value: that of a resolver in the node that needs it, if any."""
    for name in node if OmegaConf.is_dict(node) else ():
        try:
            node[name]
        except UserError as error:
            return _plain_error(error)
        except OmegaConfBaseException:
            continue
    return not_set(key)


def _plain_error(error: UserError) -> UserError:
    """Return an error of a resolver, which is one of OmegaConf as well, as one of ours alone."""
    return KeyNotSet(str(error), key=error.key) if isinstance(error, KeyNotSet) else UserError(str(error))


def not_set(key: str) -> KeyNotSet:
    """Return the error of a key without a value."""
    return KeyNotSet(f"{key} is not set. Set it on the command line: {key}=VALUE.", key=key)
