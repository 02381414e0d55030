"""Config nodes held against what they name: keys and values that fit."""

import importlib
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

from dinoseg.errors import UserError

TRUSTED = ("dinoseg", "torch.nn", "torch.optim")  # packages in which targets are looked up
LIST = (list, tuple)
PLAIN: dict[Any, Any] = {  # what an annotated parameter takes from a config
    **{int: int, float: (int, float), str: str, bool: bool, NoneType: NoneType},
    **{Sequence: LIST, Iterable: LIST, Mapping: Mapping},
}


def check_given(target: str, given: Mapping[str, Any]) -> None:
    """Refuse keys that a target of ours does not take, and values that its annotations do not allow.

    Raises:
        UserError: naming the key and what the target takes.
    """
    found = _locate(target) if _below(target, TRUSTED) else None
    if found is None:
        return
    parameters = inspect.signature(found).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    unknown = [key for key in given if key not in parameters]
    if unknown and not takes_any:
        raise UserError(
            f"{target} does not take {', '.join(unknown)}. It takes: {', '.join(name for name in parameters)}. "
            f"Check the key's spelling."
        )
    for key, value in given.items():
        if key in parameters and not _fits(value, parameters[key].annotation):
            wanted = inspect.formatannotation(parameters[key].annotation).replace("collections.abc.", "")
            bare = "Sequence" in wanted and not isinstance(value, LIST)
            remedy = f"A list is written in brackets: {key}=[{value}]." if bare else "Correct the value."
            raise UserError(f"{key}={value} is of type {_type_name(value)}, but {target} takes {wanted}. {remedy}")


def _fits(value: Any, annotation: Any) -> bool:
    """Return whether a value from a config can be what an annotation says; one not in `PLAIN` allows everything."""
    if isinstance(value, Mapping) and "_target_" in value:
        return True
    kind = get_origin(annotation) or annotation
    if kind in (Union, UnionType):
        return any(_fits(value, part) for part in get_args(annotation))
    if isinstance(value, bool) and kind in (int, float):
        return False
    parts = get_args(annotation)[:1] if PLAIN.get(kind) is LIST and isinstance(value, LIST) else ()
    return isinstance(value, PLAIN.get(kind, object)) and all(_fits(item, part) for part in parts for item in value)


def _type_name(value: Any) -> str:
    inner = sorted({type(item).__name__ for item in value}) if isinstance(value, LIST) else []
    return type(value).__name__ + (f" of {' and '.join(inner)}" if inner else "")


def _below(path: str, roots: Iterable[str]) -> bool:
    return any(path == root or path.startswith(f"{root}.") for root in roots)


def _locate(path: str) -> Any:
    """Return the object of a dotted path, importing only below the trusted packages."""
    parts = path.split(".")
    found: Any = importlib.import_module(parts[0])
    for end, part in enumerate(parts[1:], start=2):
        if not hasattr(found, part) and inspect.ismodule(found) and _below(found.__name__, TRUSTED):
            try:
                importlib.import_module(".".join(parts[:end]))
            except ImportError:
                return None
        found = getattr(found, part, None)
    return found


def targets(node: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every `_target_` below a plain node with the keys and values beside it."""
    if isinstance(node, Mapping):
        if isinstance(node.get("_target_"), str):
            yield node["_target_"], {key: value for key, value in node.items() if not str(key).startswith("_")}
        for value in node.values():
            yield from targets(value)
    elif isinstance(node, list | tuple):
        for value in node:
            yield from targets(value)
