"""What every reader of a config shares: plain dicts, their keys, and the resolvers."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError

from dinoseg.config.options import recipe_name
from dinoseg.errors import UserError
from dinoseg.wording import listed

CLASS_FILE, CELLS = "class_file", "cells"
RESOLVERS = ("len", CELLS)  # those that a checkpoint's config may use: functions of values beside them


class _Unmet(UserError, InterpolationResolutionError):
    """A mistake found while a value is resolved, which OmegaConf then passes on as it is instead of wrapping it."""

    _initialized = True


def plain(node: Any, *, resolve: bool = False) -> dict[str, Any]:
    """Return a config node as a dict; interpolations stay as they are typed unless `resolve`."""
    container = OmegaConf.to_container(node, resolve=resolve)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def background_of(cfg: DictConfig) -> int | None:
    """Return the id of the class that is no object, which `data.background` names; None: each is something.

    Raises:
        UserError: there is no such class.
    """
    value, names = cfg.data.background, list(map(str, cfg.data.classes))
    if value is None or value in names:
        return None if value is None else names.index(value)
    if type(value) is int and 0 <= value < len(names):
        return value
    raise UserError(
        f"data.background={value} is no class. Give the name or the id of one (0 to {len(names) - 1}: "
        f"{listed(names)}), or null where each class is something."
    )


def keys_of(node: Mapping[Any, Any], above: str = "") -> Iterator[str]:
    """Yield the dotted names of all keys of a plain config."""
    for key, value in node.items():
        yield f"{above}{key}"
        if isinstance(value, Mapping):
            yield from keys_of(value, f"{above}{key}.")


def has_key(node: Any, name: str) -> bool:
    """Return whether a plain config has a dotted name, in which the items of a list are numbers."""
    for part in name.split("."):
        items = node if isinstance(node, Mapping) else dict(enumerate(node)) if isinstance(node, list) else {}
        found = {str(key): value for key, value in items.items()}
        if part not in found:
            return False
        node = found[part]
    return True


def settled(node: Any) -> dict[Any, Any]:
    """Return a config node as a dict with what only this run knows written out: `classes.yaml`, and grids of cells.

    What cannot be had stands as `???`, as any value that is not set.
    """
    found = OmegaConf.to_container(node)
    assert isinstance(found, dict)
    for key, value in found.items():
        if isinstance(value, dict):
            found[key] = settled(node[key])
        elif str(value).startswith((f"${{{CLASS_FILE}:", f"${{{CELLS}:")):
            found[key] = _said(node, key)
    return found


def _said(node: DictConfig, key: Any) -> Any:
    try:
        value = node[key]
    except InterpolationResolutionError:
        return "???"
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def register_resolvers() -> None:
    """Register the functions that config files may call.

    `${len:${.classes}}` is the length of a list, `${class_file:KEY}` what `classes.yaml` says,
    `${cells:${resolution},${backbone.patch_size}}` the rows and columns of cells in a training crop (null where the
    patch size is null), and `${recipe_name:sarrarp/lora}` the name of a recipe.
    """
    OmegaConf.register_new_resolver("len", _length, replace=True)
    OmegaConf.register_new_resolver(CELLS, _cells, replace=True)
    OmegaConf.register_new_resolver(CLASS_FILE, _from_class_file, replace=True)
    OmegaConf.register_new_resolver("recipe_name", recipe_name, replace=True)


def _cells(resolution: DictConfig, patch_size: int | None) -> list[int] | None:
    if patch_size is None:
        return None
    longest = max(resolution.crop) if resolution.longest is None else resolution.longest
    factor = resolution.scale * min(1.0, longest / max(resolution.crop))  # as dinoseg.model sizes images
    return [math.ceil(max(1, round(side * factor)) / patch_size) for side in resolution.crop]


def _length(values: Any) -> int:
    if not isinstance(values, Sequence):
        raise _Unmet(f"{values} stands where a list is counted. Write it in brackets: data.classes=[background, leaf].")
    return len(values)


def squared(cfg: DictConfig) -> DictConfig:
    """Return `cfg` with a crop that is one number, n, written out as [n, n]."""
    crop = OmegaConf.select(cfg, "resolution.crop")
    return OmegaConf.merge(cfg, {"resolution": {"crop": [crop, crop]}}) if type(crop) is int else cfg  # type: ignore[return-value]


def _from_class_file(key: str, *, _root_: DictConfig) -> Any:
    """Return what `classes.yaml` in `data.root` says; where `data.classes` is given, the file is not read."""
    from dinoseg.config.nodes import not_set
    from dinoseg.data.classes.file import NAME, NOT_DESCRIBED, read_class_file

    data = _root_.get("data")
    root = None if data is None or OmegaConf.is_missing(data, "root") else data.get("root")
    if data is None or not OmegaConf.is_interpolation(data, "classes"):
        return NOT_DESCRIBED.get(key)
    path = Path(str(root or "")).expanduser() / NAME
    try:
        if root is not None and path.is_file():
            return read_class_file(path, data.ignore_index)[key]
    except UserError as error:
        raise _Unmet(str(error)) from None
    if key in NOT_DESCRIBED:
        return NOT_DESCRIBED[key]
    where = f"into {path}" if root is not None else f"into a file {NAME} in data.root"
    raise _Unmet(f"{not_set('data.classes')} Or write it {where}: `classes: [background, leaf]`.")
