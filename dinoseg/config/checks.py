"""Validation of config nodes against the signatures of their targets: known keys, types and ranges."""

import importlib
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from dinoseg.utils.errors import UserError
from dinoseg.utils.ranges import LIST, bare, check_value, describe_type, is_part, matches

TRUSTED = ("dinoseg", "torch.nn", "torch.optim")  # packages whose targets are imported and inspected


def check_arguments(target: str, arguments: Mapping[str, Any], names: Mapping[str, str] | None = None) -> None:
    """Refuse keys that a target does not take, and values that its annotations do not allow.

    Args:
        target: a dotted path; targets outside the trusted packages are not checked.
        arguments: its keyword arguments.
        names: full config keys of these arguments, for messages; an argument without one appears by its own name.

    Raises:
        UserError: naming the key and what the target takes.
    """
    part = _locate(target) if _below(target, TRUSTED) else None
    if part is None:
        return
    parameters = inspect.signature(part).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    unknown = [key for key in arguments if key not in parameters]
    if unknown and not takes_any:
        raise UserError(
            f"{target} does not take {', '.join(unknown)}. It takes: {', '.join(name for name in parameters)}. "
            f"Check the key's spelling."
        )
    for key, value in arguments.items():
        if key in parameters:
            _check_value((names or {}).get(key, key), value, parameters[key].annotation)


def checked(target: str, node: Mapping[str, Any], keys: Mapping[str, str], where: str) -> dict[str, Any]:
    """Return config values by the parameter names of a target, validated against its signature.

    Args:
        target: full name of the callable that takes them.
        node: mapping that holds the values.
        keys: from keys of the node to parameter names.
        where: full key of the node, for messages.

    Raises:
        UserError: the target does not take a value.
    """
    given = {name: node[key] for key, name in keys.items()}
    check_arguments(target, given, {name: f"{where}.{key}" for key, name in keys.items()})
    return given


def _check_value(key: str, value: Any, annotation: Any) -> None:
    check_value(key, value, annotation, None if matches(value, annotation) else _remedy(key, value, annotation))


def _remedy(key: str, value: Any, annotation: Any) -> str:
    """Return what to write instead of a value of another type, on the command line or in a YAML file."""
    if is_part(bare(annotation)):
        return f"It is a group of keys: set one of them, as {key}.KEY=VALUE."
    remedy = f"Give {describe_type(annotation)}."
    if not isinstance(value, LIST) and matches([value], annotation):
        remedy += f" A list is written in brackets: {key}=[{value}]."
    elif isinstance(value, bool) and matches("off", annotation):
        remedy += ' In a YAML file, off, on, yes and no mean false and true: write such a word in quotes ("off").'
    return remedy


def _below(path: str, roots: Iterable[str]) -> bool:
    return any(path == root or path.startswith(f"{root}.") for root in roots)


def _locate(path: str) -> Any:
    """Return the object at a dotted path; import modules only below the trusted packages."""
    names = path.split(".")
    part: Any = importlib.import_module(names[0])
    for end, name in enumerate(names[1:], start=2):
        # a submodule is no attribute of its package before it is imported
        if inspect.ismodule(part) and name not in vars(part) and _below(part.__name__, TRUSTED):
            try:
                importlib.import_module(".".join(names[:end]))
            except ImportError:
                return None
        part = getattr(part, name, None)
    return part
