"""What a config read from a file may say: what this machine's own config files say at the same place, and plain values.

`docs/security.md` says what this promises.
"""

import importlib
import inspect
import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from dinoseg.config.moved import today
from dinoseg.config.places import Steps, at, below, dotted, nests, resolved
from dinoseg.config.registry import LISTED, Place, Registry, own_registry
from dinoseg.config.values import RESOLVERS
from dinoseg.errors import UserError
from dinoseg.wording import shown

ACTING = ("prepare", "render")  # of data: nodes that write files, which a checkpoint leaves out
LARGEST: Mapping[Steps, float] = {  # what a number below a key may be at most; the longest key that fits counts
    **{("seed",): 2**63 - 1, ("resolution",): 2**14, ("resolution", "scale"): 16},
    **{("head", "iterations"): 2**8, ("head", "first_iterations"): 2**8, ("resolution", "longest"): 2**20},
    **dict.fromkeys([("backbone",), ("adapter",), ("head",)], 2**16),
    **{("data",): 2**20, ("data", "workers"): 2**8, ("data", "batch_size"): 2**16, ("loss",): 2**20},
    **{("trainer",): 2**40, ("optim",): 2**40},
}
_MOST_PIXELS = 2**30  # of all images of a training batch
_LONGEST_TEXT = 4096
_MOST_VALUES = 20_000  # a table of more takes OmegaConf minutes; our largest config holds a thousand
_MOST_POINTED = 10**6  # letters and values that all interpolations together stand for
_KEY = re.compile(r"-?[^\W_][\w -]*")
_POINTER = re.compile(r"\$\{(\.*)([A-Za-z]\w*(?:\.[A-Za-z0-9]\w*)*)\}")
_COMPUTED = re.compile(rf"\$\{{(?:{'|'.join(RESOLVERS)}):[ ,]*\}}")  # once the pointers in it are taken out
_MOST_STEPS = 20  # from one interpolation to the next
_OWN_WEIGHTS = re.compile(r"random|timm|dinoseg:\w+")
_REMEDY = "Do not use this file unless you know who made it"


def guard(
    config: Mapping[str, Any],
    where: str,
    own: Mapping[str, Any] | None = None,
    *,
    trust: Collection[str] = (),
    given: Collection[str] = (),
) -> None:
    """Refuse a config read from a file that says more than config files of this machine could, but for plain values.

    No target is imported before its name is known to be allowed at its place.

    Args:
        config: plain, not resolved.
        where: what an error calls the file.
        own: the config that the command line composed, plain, not resolved.
        trust: packages whose targets the user allows at any place, and hub ids that weights may come from.
        given: keys that the command line gives instead of the file.

    Raises:
        UserError: naming the place, what stands there, and what would be allowed.
    """
    own = own or {}
    registry = own_registry(own)
    for count, (place, node) in enumerate(below(config, ())):
        if count > _MOST_VALUES:
            raise UserError(f"{where}: its config holds more than {_MOST_VALUES} values. {_REMEDY}.")
        key = dotted(place)
        if isinstance(node, Mapping):
            _check_keys(node, place, f"{where}: {key}")
            if "_target_" in node or "_partial_" in node or _place(place, registry).targets:
                _check_target(node, place, registry, trust, f"{where}: {key}")
        elif node is not None and _place(place, registry).targets:
            raise UserError(f"{where}: {key}={shown(node)} is refused: config files put a _target_ there. {_REMEDY}.")
        elif isinstance(node, str):
            _check_text(node, place, f"{where}: {key}={shown(node)}")
        if not (isinstance(node, str) and "${" in node):
            _check_value(node, place, f"{where}: {key}={shown(node)}")
    _check_pointers(config, own, where)
    _check_resolved(config, own, where)
    _check_weights(config, registry, trust, given, where)


def renamed(node: Any) -> Any:
    """Return a plain config with the targets that have moved since under their names of today."""
    if isinstance(node, Mapping):
        return {
            key: today(value) if key == "_target_" and isinstance(value, str) else renamed(value)
            for key, value in node.items()
        }
    return [renamed(value) for value in node] if isinstance(node, list) else node


def _check_keys(node: Mapping[Any, Any], place: Steps, what: str) -> None:
    for key in node:
        if not isinstance(key, str) or not (key in ("_target_", "_partial_") or _KEY.fullmatch(key)):
            raise UserError(
                f"{what}: the key {shown(key)} is refused. A config from a checkpoint names every argument, and its "
                f"keys are made of letters, digits, blanks and signs - and _. {_REMEDY}."
            )
    for key in ACTING if place == ("data",) else ():
        if node.get(key) is not None:
            raise UserError(f"{what}.{key} is refused: a checkpoint may not act on files. {_REMEDY}.")


def _check_target(node: Mapping[str, Any], place: Steps, registry: Registry, trust: Collection[str], what: str) -> None:
    target, partial = node.get("_target_"), node.get("_partial_", False)
    here = _place(place, registry)
    if not isinstance(target, str) or not (target in here.targets or _trusted(target, trust)):
        listed = f"there they name {', '.join(sorted(here.targets))}" if here.targets else "there they name none"
        raise UserError(
            f"{what}._target_={shown(target)} is refused: no config file on this machine names it there ({listed}). "
            f"{_REMEDY}; then say so with trust=[PACKAGE], which lets it use all of that package."
        )
    if not isinstance(partial, bool) or (target in here.targets and partial not in (here.partial or {False})):
        raise UserError(
            f"{what}._partial_={shown(partial)} is refused: config files on this machine say otherwise. {_REMEDY}."
        )
    takes = _parameters(target, target in here.targets, trust, what)
    for key, value in node.items():
        taken = takes is None or key in takes or (key in here.values and not nests(value))
        if not taken and key not in ("_target_", "_partial_"):
            raise UserError(f"{what}.{key} is refused: {target} takes no {key}. {_REMEDY}.")


def _place(place: Steps, registry: Registry) -> Place:
    return registry.get(tuple(LISTED if isinstance(key, int) else key for key in place), Place())


def _trusted(target: str, trust: Collection[str]) -> bool:
    """Return whether a name is public and below a trusted package; `_parameters` looks at what it stands for."""
    public = all(part.isidentifier() and not part.startswith("_") for part in target.split("."))
    return public and _inside(target, trust)


def _inside(name: str, packages: Collection[str]) -> bool:
    return any(f"{name}.".startswith(f"{package}.") for package in packages)


def _parameters(target: str, known: bool, trust: Collection[str], what: str) -> Collection[str] | None:
    """Return the names of what an allowed target takes, None for any."""
    found = _located(target)
    home = getattr(found, "__module__", None) or ""
    if not (inspect.isclass(found) or inspect.isfunction(found)):
        raise UserError(f"{what}._target_={target} is refused: it is neither a class nor a function here. {_REMEDY}.")
    if not known and not _inside(f"{home}.{found.__name__}", trust):
        raise UserError(
            f"{what}._target_={target} is refused: it is {home}.{found.__name__}, and trust={list(trust)} does not "
            f"name that package. {_REMEDY}."
        )
    parameters = inspect.signature(found).parameters.values()
    return None if any(each.kind is each.VAR_KEYWORD for each in parameters) else [each.name for each in parameters]


def _located(target: str) -> Any:
    """Return the object of a dotted name that is already known to be allowed, None where there is none."""
    parts = target.split(".")
    for end in range(len(parts) - 1, 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            found = getattr(found, part, None)
        return found
    return None


def _check_text(text: str, place: Steps, what: str) -> None:
    if len(text) > _LONGEST_TEXT:
        raise UserError(f"{what} has {len(text)} letters, above the most, {_LONGEST_TEXT}. {_REMEDY}.")
    rest = _COMPUTED.sub("", _POINTER.sub("", text))
    if "${" in text and ("$" in rest or "\\" in rest):
        raise UserError(f"{what}: this interpolation is refused. A config from a checkpoint may only point within it.")
    if place[-1:] == ("cache_dir",) and text != "${cache_dir}":
        raise UserError(
            f"{what} is refused. A config from a checkpoint may not say where files are written: only cache_dir of "
            "your own command line does."
        )


def _check_value(value: Any, place: Steps, what: str) -> None:
    """Refuse a value, none of it an interpolation any more, that writes elsewhere or asks for too much."""
    if place == ("data", "tracking", "folder") and isinstance(value, str):
        if not re.fullmatch(r"\w+(/\w+)*", value):
            raise UserError(f"{what} is refused. A config from a checkpoint may only name folders below the run's own.")
    elif place[-1:] == ("cache_dir",) and not isinstance(value, str) or place == ("data", "tracking", "folder"):
        raise UserError(f"{what} is refused: it is no name of a folder. {_REMEDY}.")
    if value is None or isinstance(value, bool | str | list | Mapping):
        return
    if not isinstance(value, int | float):
        raise UserError(f"{what} is of type {type(value).__name__}, and a config from a checkpoint holds plain values.")
    most = next((LARGEST[place[:end]] for end in range(len(place), 0, -1) if place[:end] in LARGEST), 2**20)
    if not (abs(value) <= most and math.isfinite(value)):
        raise UserError(f"{what} is refused: a checkpoint may ask for {most} there at most. {_REMEDY}.")


def _check_pointers(config: Mapping[str, Any], own: Mapping[str, Any], where: str) -> None:
    """Refuse interpolations of what is to be built, or of so much that it would not end."""
    whole, pointed = {**own, **config}, 0
    for place, text in below(config, ()):
        for pointer in _POINTER.finditer(text) if isinstance(text, str) else ():
            what = f"{where}: {dotted(place)}={shown(text)}"
            found = _followed(whole, place, pointer, what)
            if nests(found):
                raise UserError(
                    f"{what} is refused: it points at something that is built, which may stand only where config files "
                    f"put it. {_REMEDY}."
                )
            pointed += sum(1 + len(node) if isinstance(node, str) else 1 for _, node in below(found, ()))
            if pointed > _MOST_POINTED:
                raise UserError(f"{where}: its interpolations stand for more than {_MOST_POINTED} values. {_REMEDY}.")


def _followed(whole: Mapping[str, Any], place: Steps, pointer: re.Match[str], what: str) -> Any:
    """Return what a pointer at a place leads to, by way of others that stand alone; None where nothing stands."""
    for _ in range(_MOST_STEPS):
        dots, path = len(pointer[1]), pointer[2].split(".")
        place = (*(place[: max(0, len(place) - dots)] if dots else ()), *path)
        found = at(whole, place)
        following = _POINTER.fullmatch(found) if isinstance(found, str) else None
        if following is None:
            texts = [node for _, node in below(found, ()) if isinstance(node, str)]
            if nests(found) or all("${" not in text or _COMPUTED.fullmatch(_POINTER.sub("", text)) for text in texts):
                return found
            break
        pointer = following
    raise UserError(f"{what} is refused: it leads from one interpolation to the next. {_REMEDY}.")


def _check_weights(
    config: Mapping[str, Any], registry: Registry, trust: Collection[str], given: Collection[str], where: str
) -> None:
    """Refuse to fetch weights from a place that only the file names."""
    backbone = config.get("backbone")
    weights = backbone.get("weights") if isinstance(backbone, Mapping) else None
    if weights is None or "backbone.weights" in given:
        return
    known = registry.get(("backbone",), Place()).values.get("weights", set())
    if isinstance(weights, str) and (weights in known or weights in trust or _OWN_WEIGHTS.fullmatch(weights)):
        return
    if not isinstance(weights, str) or "${" in weights or not _exists(weights):
        raise UserError(
            f"{where}: backbone.weights={shown(weights)} is refused: it is no file or folder here, and no config file "
            f"on this machine names it. Give the weights yourself, backbone.weights=PATH, or let the file name this "
            f"place: trust=[{shown(weights)}]."
        )


def _exists(path: str) -> bool:
    try:
        return Path(path).expanduser().exists()
    except (OSError, RuntimeError, ValueError):  # too long a name, nobody's home, nothing that a name may hold
        return False


def _check_resolved(config: Mapping[str, Any], own: Mapping[str, Any], where: str) -> None:
    """Hold what interpolations stand for against the rules of the place where they stand: to point is no way round."""
    whole = OmegaConf.create({**own, **config})
    for place, text in below(config, ()):
        if isinstance(text, str) and "${" in text:
            for deeper, value in below(resolved(whole, place), place):
                if value is not None:
                    _check_value(value, deeper, f"{where}: {dotted(place)}={text}, which stands for {shown(value)},")
    crop, batch = (resolved(whole, place) for place in (("resolution", "crop"), ("data", "batch_size")))
    frames = resolved(whole, ("data", "clips", "cut", "length"))
    sizes = [*(crop if isinstance(crop, list) else [crop]), batch, frames]
    pixels = math.prod(abs(size) for size in sizes if isinstance(size, int | float))
    if pixels > _MOST_PIXELS:
        raise UserError(
            f"{where}: resolution.crop={crop} with data.batch_size={batch} is refused: a checkpoint may ask for "
            f"batches of {_MOST_PIXELS} pixels at most. {_REMEDY}."
        )
