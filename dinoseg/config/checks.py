"""Validation of config nodes against the signatures of their targets: known keys, types and ranges."""

import importlib
import inspect
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from dinoseg.utils.errors import UserError
from dinoseg.utils.ranges import Range
from dinoseg.utils.wording import format_value

TRUSTED = ("dinoseg", "torch.nn", "torch.optim")  # packages whose targets are imported and inspected
LIST = (list, tuple)
_LONGEST = 200  # characters of a value in a message
PLAIN: dict[Any, Any] = {  # annotation to the types that a config may give for it
    **{int: int, float: (int, float), str: str, bool: bool, NoneType: NoneType},
    **{Path: (str, Path), Sequence: LIST, Iterable: LIST, tuple: LIST, Mapping: Mapping},
}
_WORDS: dict[Any, str] = {
    **{int: "a whole number", float: "a number", str: "text", bool: "true or false", NoneType: "null"},
    **{Path: "a path", Mapping: "a mapping"},
}
_PLURALS = {"a whole number": "whole numbers", "a number": "numbers", "text": "texts", "a path": "paths"}
_PLAIN_VALUES = (NoneType, bool, int, float, str, *LIST, Mapping)


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
    if not _matches(value, annotation):
        remedy = f"Give {_wanted(annotation)}."
        if not isinstance(value, LIST) and _matches([value], annotation):
            remedy += f" A list is written in brackets: {key}=[{value}]."
        elif isinstance(value, bool) and _matches("off", annotation):
            remedy += ' In a YAML file, off, on, yes and no mean false and true: write such a word in quotes ("off").'
        elif _is_part(_bare(annotation)):
            remedy = f"It is a group of keys: set one of them, as {key}.KEY=VALUE."
        text = "null" if value is None else format_value(str(value), _LONGEST)
        raise UserError(f"{key}={text} is of type {_type_name(value)}. {remedy}")
    if rules := _broken(value, annotation):
        rules += ["null"] * (NoneType in get_args(annotation))
        raise UserError(
            f"{key}={format_value(str(value), _LONGEST)} is out of range. Give {', or '.join(dict.fromkeys(rules))}."
        )


def _matches(value: Any, annotation: Any) -> bool:
    """Return whether a config value matches an annotation; annotations that are not in `PLAIN` allow everything."""
    if isinstance(value, Mapping) and "_target_" in value:
        return True
    annotation = _bare(annotation)
    kind = get_origin(annotation) or annotation
    if kind in (Union, UnionType):
        return any(_matches(value, part) for part in get_args(annotation))
    if isinstance(value, bool) and kind in (int, float):
        return False
    if _is_part(kind) and isinstance(value, _PLAIN_VALUES):
        return isinstance(value, kind)
    if isinstance(value, LIST) and kind is tuple and get_args(annotation)[1:] != (...,):
        return len(value) == len(get_args(annotation)) and all(map(_matches, value, get_args(annotation)))
    parts = _parts(value, annotation)
    return isinstance(value, PLAIN.get(kind, object)) and all(_matches(item, part) for item, part in parts)


def _broken(value: Any, annotation: Any) -> list[str]:
    """Return the rules of the ranges that a value of the right type violates.

    For a union, the list is empty if the value satisfies one member.
    """
    ranges = [rule for rule in get_args(annotation) if isinstance(rule, Range)]
    annotation = _bare(annotation)
    if get_origin(annotation) in (Union, UnionType):
        broken = [_broken(value, part) for part in get_args(annotation) if _matches(value, part)]
        return [] if [] in broken else sum(broken, [])
    if isinstance(value, int | float) and not isinstance(value, bool):
        finite = [] if abs(value) <= sys.float_info.max else ["a finite number"]  # integers may be larger
        return [rule.rule for rule in ranges if value not in rule] or finite
    of_items = [f"{rule} for each" for item, part in _parts(value, annotation) for rule in _broken(item, part)]
    return [rule.replace(" for each for each", " for each") for rule in of_items]


def _is_part(kind: Any) -> bool:
    """Return whether a type is a class of this package, which a config describes by a `_target_`."""
    return inspect.isclass(kind) and _below(kind.__module__, TRUSTED[:1])


def _parts(value: Any, annotation: Any) -> list[tuple[Any, Any]]:
    """Return the items of a list or mapping, each with its annotation."""
    arguments = get_args(annotation)
    kind = PLAIN.get(get_origin(annotation))
    if kind is LIST and isinstance(value, LIST):
        return [(item, arguments[0]) for item in value]
    if kind is Mapping and isinstance(value, Mapping):
        return [(item, arguments[1]) for item in value.values()]
    return []


def _bare(annotation: Any) -> Any:
    """Return an annotation without its ranges."""
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _wanted(annotation: Any) -> str:
    """Return the values that an annotation allows, in words, such as `a whole number or null`."""
    annotation = _bare(annotation)
    kind, arguments = get_origin(annotation) or annotation, get_args(annotation)
    if kind in (Union, UnionType):
        return " or ".join(map(_wanted, arguments))
    if PLAIN.get(kind) is LIST:
        count = "" if kind is not tuple or ... in arguments else f"{len(arguments)} "
        return f"a list of {count}{_PLURALS.get(_wanted(arguments[0]), 'lists')}" if arguments else "a list"
    return str(_WORDS.get(kind) or getattr(kind, "__name__", kind))


def _type_name(value: Any) -> str:
    inner = sorted({type(item).__name__ for item in value}) if isinstance(value, LIST) else []
    return type(value).__name__ + (f" of {' and '.join(inner)}" if inner else "")


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
