"""Validation of configs read from files: plain values, and targets of this machine's config files at the same place.

`docs/security.md` describes the guarantee.
"""

import importlib
import inspect
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from dinoseg.config.limits import REMEDY, check_batch, check_text, check_value
from dinoseg.config.plain import BUILDS, Steps, at, below, dotted, nests, resolved, texts_of
from dinoseg.config.registry import LISTED, Registry, RegistryEntry, full_registry
from dinoseg.config.resolvers import RESOLVERS
from dinoseg.utils.errors import UserError
from dinoseg.utils.wording import format_value

ACTING = ("prepare", "render")  # keys of data for nodes that write files; checkpoints omit them
_MAX_VALUES = 20_000  # OmegaConf takes minutes for larger configs; our largest one holds a thousand values
_KEY = re.compile(r"-?[^\W_][\w -]*")
_BY_CLASS = ("loss", "weights")  # its keys are class names, with any letters and signs
_AT_COMMIT = re.compile(r"(.+)@[0-9a-f]{40}")
_BUILT_IN_WEIGHTS = re.compile(r"random|timm|dinoseg:\w+")
_PATH = re.compile(r"[/~.].*|.*\\.*|.*\.(safetensors|pth|pt|bin)")


def guard(
    config: Mapping[str, Any],
    where: str,
    composed: Mapping[str, Any] | None = None,
    *,
    trust: Collection[str] = (),
    typed: Collection[str] = (),
    registry: Registry | None = None,
) -> None:
    """Refuse a config from a file that contains more than this machine's config files allow, apart from plain values.

    No target is imported before its name is known to be allowed at its place.

    Args:
        config: plain, with interpolations unresolved.
        where: name of the file in errors.
        composed: the config of the command line, plain, with interpolations unresolved.
        trust: packages whose targets the user allows at any place, and hub ids that weights may come from.
        typed: keys that the command line sets instead of the file.
        registry: allowed content by place; default: that of the running Hydra's config files.

    Raises:
        UserError: naming the place, its content, and what would be allowed.
    """
    composed = composed or {}
    registry = full_registry(composed) if registry is None else registry
    for count, (steps, node) in enumerate(below(config, ())):
        if count > _MAX_VALUES:
            raise UserError(f"{where}: its config holds more than {_MAX_VALUES} values. {REMEDY}.")
        what, known = f"{where}: {dotted(steps)}", _entry(steps, registry)
        if isinstance(node, Mapping):
            _check_keys(node, steps, what)
            if "_target_" in node or "_partial_" in node or known.targets:
                _check_target(node, known, trust, what)
        elif node is not None and known.targets:
            raise UserError(f"{what}={format_value(node)} is refused: config files put a _target_ there. {REMEDY}.")
        elif isinstance(node, str):
            check_text(node, steps, f"{what}={format_value(node)}")
            check_form(node, f"{what}={format_value(node)}")
        if not (isinstance(node, str) and "${" in node):
            check_value(node, steps, f"{what}={format_value(node)}")
    check_interpolations(config, composed, where)
    if "backbone.weights" not in typed:
        _check_weights(config, registry, trust, where)


def _check_keys(node: Mapping[Any, Any], steps: Steps, what: str) -> None:
    for key in node:
        if not isinstance(key, str) or not (key in ("_target_", "_partial_") or _may_name(key, steps)):
            raise UserError(
                f"{what}: the key {format_value(key)} is refused. A config from a checkpoint names every argument, and "
                f"its keys consist of letters, digits, spaces, - and _. {REMEDY}."
            )
    for key in ACTING if steps == ("data",) else ():
        if node.get(key) is not None:
            raise UserError(f"{what}.{key} is refused: a checkpoint must not access files. {REMEDY}.")


def _may_name(key: str, steps: Steps) -> bool:
    return bool(_KEY.fullmatch(key)) or (steps == _BY_CLASS and key.isprintable() and key not in BUILDS)


def _check_target(node: Mapping[str, Any], allowed: RegistryEntry, trust: Collection[str], what: str) -> None:
    target, partial = node.get("_target_"), node.get("_partial_", False)
    if not isinstance(target, str) or not (target in allowed.targets or _trusted(target, trust)):
        listed = (
            f"there they name {', '.join(sorted(allowed.targets))}" if allowed.targets else "there they name no class"
        )
        raise UserError(
            f"{what}._target_={format_value(target)} is refused: no config file on this machine names it there "
            f"({listed}). {REMEDY}. For a component of your own, add the --config-dir DIR (or hydra.searchpath) of its "
            "training; trust=[PACKAGE] allows everything in that package."
        )
    known = target in allowed.targets
    if not isinstance(partial, bool) or (known and partial not in (allowed.partial or {False})):
        raise UserError(
            f"{what}._partial_={format_value(partial)} is refused: config files on this machine set another value. "
            f"{REMEDY}."
        )
    takes = _parameters(target, known, trust, what)
    for key, value in node.items():
        taken = takes is None or key in takes or (key in allowed.values and not nests(value))
        if not taken and key not in ("_target_", "_partial_"):
            raise UserError(f"{what}.{key} is refused: {target} takes no {key}. {REMEDY}.")


def _entry(steps: Steps, registry: Registry) -> RegistryEntry:
    """Return what config files write at a place."""
    return registry.get(tuple(LISTED if isinstance(step, int) else step for step in steps), RegistryEntry())


def _trusted(target: str, trust: Collection[str]) -> bool:
    """Return whether a target is a public name below a trusted package; `_parameters` checks the object behind it."""
    public = all(part.isidentifier() and not part.startswith("_") for part in target.split("."))
    return public and _inside(target, trust)


def _inside(name: str, packages: Collection[str]) -> bool:
    return any(f"{name}.".startswith(f"{package}.") for package in packages)


def _parameters(target: str, known: bool, trust: Collection[str], what: str) -> Collection[str] | None:
    """Return the parameter names of an allowed target; None if it takes any."""
    part = _located(target, what)
    if not (inspect.isclass(part) or inspect.isfunction(part)):
        raise UserError(
            f"{what}._target_={target} is refused: it is neither a class nor a function on this machine. {REMEDY}."
        )
    # a trusted package may import anything, such as os.system: the object must be defined in the package, too
    if not known and not _inside(f"{part.__module__}.{part.__name__}", trust):
        raise UserError(
            f"{what}._target_={target} is refused: it is {part.__module__}.{part.__name__}, and trust={list(trust)} "
            f"does not name that package. {REMEDY}."
        )
    parameters = inspect.signature(part).parameters.values()
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    return None if takes_any else [parameter.name for parameter in parameters]


def _located(target: str, what: str) -> Any:
    """Return the object of an already allowed dotted name; None if its module lacks the name.

    Raises:
        UserError: its module cannot be imported, with the reason.
    """
    names = target.split(".")
    reason: Exception | None = None
    for end in range(len(names) - 1, 0, -1):
        module = ".".join(names[:end])
        try:
            part: Any = importlib.import_module(module)
        except (ImportError, OSError) as error:  # OSError: a library of the system is missing
            reason = reason or error
            # the module itself is missing, not one of its imports: the name may be that of a class inside a module
            if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
                continue
            break
        for name in names[end:]:
            part = getattr(part, name, None)
        if part is not None or reason is None:
            return part
    raise UserError(
        f"{what}._target_={target} is allowed, but cannot be imported here ({type(reason).__name__}: {reason}). "
        "Install the missing package, or add the folder of your own package to PYTHONPATH."
    ) from reason


def _check_weights(config: Mapping[str, Any], registry: Registry, trust: Collection[str], where: str) -> None:
    """Refuse weights from a place that only the file names, since they would be downloaded."""
    backbone = config.get("backbone")
    weights = backbone.get("weights") if isinstance(backbone, Mapping) else None
    known = registry.get(("backbone",), RegistryEntry()).values.get("weights", set())
    if weights is None:
        return
    if isinstance(weights, str):
        at_commit = _AT_COMMIT.fullmatch(weights)
        source = at_commit[1] if at_commit else weights
        if source in known or source in trust or weights in trust or _BUILT_IN_WEIGHTS.fullmatch(weights):
            return
    if not isinstance(weights, str) or "${" in weights or not _exists(weights):
        message = (
            f"{where}: its config sets backbone.weights={format_value(weights)}, which is neither a file nor a folder "
            "on this machine"
        )
        if isinstance(weights, str) and _PATH.fullmatch(weights):
            raise UserError(f"{message}. Set its current path: backbone.weights=PATH.")
        raise UserError(
            f"{message}, and no config file on this machine names it, so nothing is downloaded. Set "
            f"backbone.weights=PATH, or allow this source: trust=[{format_value(weights)}]."
        )


def _exists(path: str) -> bool:
    try:
        return Path(path).expanduser().exists()
    except (OSError, RuntimeError, ValueError):  # too long, an unknown home directory, or invalid characters
        return False


_MAX_POINTED = 10**6  # characters and values that all interpolations together may resolve to
_MAX_STEPS = 20  # length of a chain of interpolations
_POINTER = re.compile(r"\$\{(\.*)([A-Za-z]\w*(?:\.[A-Za-z0-9]\w*)*)\}")
_COMPUTED = re.compile(rf"\$\{{(?:{'|'.join(RESOLVERS)}):[ ,]*\}}")  # after the pointers in it have been removed


def check_form(text: str, what: str) -> None:
    """Refuse a text with interpolations that do more than point within the config or compute from pointers."""
    rest = _COMPUTED.sub("", _POINTER.sub("", text))
    if "${" in text and ("$" in rest or "\\" in rest):
        raise UserError(
            f"{what}: this interpolation is refused. A config from a checkpoint may only refer to its own keys."
        )


def check_interpolations(config: Mapping[str, Any], composed: Mapping[str, Any], where: str) -> None:
    """Refuse interpolations that point to a `_target_`, resolve to too much, or give a value that is not allowed there.

    Args:
        config: from the file, plain; each text in it has passed `check_form`.
        composed: the config of the command line, plain; keys that the file lacks are looked up there.
        where: name of the file in errors.
    """
    _check_pointers(config, {**composed, **config}, where)
    whole = OmegaConf.create({**composed, **config})
    for steps, text in below(config, ()):
        if isinstance(text, str) and "${" in text:
            # the resolved value has to satisfy the rules of this place, or a pointer would bypass them
            for deeper, value in below(resolved(whole, steps), steps):
                if value is not None:
                    check_value(
                        value, deeper, f"{where}: {dotted(steps)}={text}, which resolves to {format_value(value)},"
                    )
    check_batch(whole, where)


def _check_pointers(config: Mapping[str, Any], whole: Mapping[str, Any], where: str) -> None:
    pointed = 0
    for steps, text in below(config, ()):
        for pointer in _POINTER.finditer(text) if isinstance(text, str) else ():
            what = f"{where}: {dotted(steps)}={format_value(text)}"
            target = _followed(whole, steps, pointer, what)
            if nests(target):
                raise UserError(
                    f"{what} is refused: it refers to a component, which is allowed only where config files put it. "
                    f"{REMEDY}."
                )
            # counted before OmegaConf resolves any: thousands of pointers to one large table would take hours
            pointed += sum(1 + len(node) if isinstance(node, str) else 1 for _, node in below(target, ()))
            if pointed > _MAX_POINTED:
                raise UserError(f"{where}: its interpolations resolve to more than {_MAX_POINTED} values. {REMEDY}.")


def _followed(whole: Mapping[str, Any], steps: Steps, pointer: re.Match[str], what: str) -> Any:
    """Return what a pointer leads to, through pointers that stand alone; None if there is nothing.

    Args:
        whole: the config that it points within.
        steps: to the pointer, from which leading dots count.
        pointer: a match of `_POINTER`.
        what: file, key and value, for the message.
    """
    for _ in range(_MAX_STEPS):
        dots, names = len(pointer[1]), pointer[2].split(".")
        steps = (*(steps[: max(0, len(steps) - dots)] if dots else ()), *names)
        target = at(whole, steps)
        if any(
            "${" in part for part in (at(whole, steps[:end]) for end in range(1, len(steps))) if isinstance(part, str)
        ):
            break  # below what another pointer leads to, of which nothing is counted
        following = _POINTER.fullmatch(target) if isinstance(target, str) else None
        if following is None:
            if nests(target) or all("${" not in text or _computes(text) for text in texts_of(target)):
                return target
            break
        pointer = following
    raise UserError(f"{what} is refused: it is a chain of interpolations. {REMEDY}.")


def _computes(text: str) -> bool:
    return bool(_COMPUTED.fullmatch(_POINTER.sub("", text)))
