"""Config nodes held against what they name: keys and values that fit, and targets that a file may name."""

import importlib
import inspect
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

from omegaconf import OmegaConf

from dinoseg.errors import UserError

TRUSTED = ("dinoseg", "torch.nn", "torch.optim")  # packages in which targets are looked up
ROOMS = {  # what each group of a config from a file may name: parts of a model, nothing that acts by itself
    "backbone": ("dinoseg.backbones",),
    "adapter": ("dinoseg.adapters",),
    "head": ("dinoseg.heads", "torch.nn"),
    "loss": ("dinoseg.losses", "dinoseg.data.frequencies", "torch.nn"),
    "data": ("dinoseg.data", "dinoseg.metrics.protocols"),
    "optim": ("dinoseg.training.optim", "torch.optim"),
    "trainer": ("dinoseg.training.fit",),
}
_ACTING = (
    *("archives", "doctor", "loader", "packed", "packed_draft", "packed_read", "packed_store"),
    *("prepare_idd", "prepare_sarrarp", "scan", "scan_cache", "synthetic", "video_frames", "video_index"),
)
ACTING = tuple(f"dinoseg.data.{name}" for name in _ACTING)  # of the data room, but they write files or start processes
LIST = (list, tuple)
PLAIN: dict[Any, Any] = {  # what an annotated parameter takes from a config
    **{int: int, float: (int, float), str: str, bool: bool, NoneType: NoneType},
    **{Sequence: LIST, Iterable: LIST, Mapping: Mapping},
}


def guard(node: Mapping[str, Any], where: str = "config") -> None:
    """Refuse a config read from a file that names anything but the parts it may name.

    Each `_target_` is looked up step by step in its group's `ROOMS`, and the object found must itself be a class or
    function defined there: `dinoseg.heads.linear.torch.hub.load` starts rightly and ends elsewhere. Interpolations
    may only point inside the config.

    Raises:
        UserError: naming the target, the folder or the interpolation.
    """
    plain: Any = OmegaConf.to_container(node, resolve=False) if OmegaConf.is_config(node) else node
    for group, part in ({"": plain} if "_target_" in plain else plain).items():
        for target, _ in targets(part):
            _refuse_unless_named(target, ROOMS.get(group, ()), f"{where}: _target_={target} is refused in {group}.")
    for key in _keys_of(plain):
        if key.startswith("_") and key not in ("_target_", "_partial_"):  # _args_ would pass by the names of arguments
            raise UserError(f"{where}: the key {key} is refused. A config from a checkpoint names every argument.")
    for place in _values_of("cache_dir", plain):
        if place != "${cache_dir}":
            raise UserError(
                f"{where}: cache_dir={place} is refused. A config from a checkpoint may not say where files are "
                "written: only cache_dir of your own command line does."
            )
    for place in (folder for node in _values_of("tracking", plain) for folder in _values_of("folder", node)):
        if not isinstance(place, str) or not re.fullmatch(r"\w+(/\w+)*", place):
            raise UserError(
                f"{where}: data.tracking.folder={place} is refused. A config from a checkpoint may only name folders "
                "below the run's own."
            )
    for text in _strings(plain):
        if "${" in text and ":" in text.replace("${len:", ""):
            raise UserError(
                f"{where}: the interpolation {text} is refused. A config from a checkpoint may only point within it."
            )


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


def _refuse_unless_named(target: str, rooms: Sequence[str], refused: str) -> None:
    found = _locate(target) if _below(target, rooms) else None
    home = getattr(found, "__module__", None) or ""
    if not (inspect.isclass(found) or inspect.isfunction(found)) or not _below(home, rooms) or _below(home, ACTING):
        raise UserError(
            f"{refused} A config from a checkpoint may only name classes and functions of "
            f"{', '.join(rooms) or 'no module there'}. Do not use this file, or rebuild the run from your own config."
        )


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


def _values_of(key: str, node: Any) -> Iterator[Any]:
    """Yield every value that stands under a key, at any depth."""
    if isinstance(node, Mapping):
        yield from (value for name, value in node.items() if name == key)
    for value in node.values() if isinstance(node, Mapping) else node if isinstance(node, list | tuple) else ():
        yield from _values_of(key, value)


def _keys_of(node: Any) -> Iterator[str]:
    """Yield every key at any depth, as text."""
    if isinstance(node, Mapping):
        yield from map(str, node)
    for value in node.values() if isinstance(node, Mapping) else node if isinstance(node, list | tuple) else ():
        yield from _keys_of(value)


def _strings(node: Any) -> Iterator[str]:
    if isinstance(node, Mapping):
        for value in node.values():
            yield from _strings(value)
    elif isinstance(node, list | tuple):
        for value in node:
            yield from _strings(value)
    elif isinstance(node, str):
        yield node
