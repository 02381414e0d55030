"""Plain configs, which are dicts and lists: what stands where, by keys and indices or by dotted names."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

Steps = tuple[str | int, ...]  # keys and indices, from the root of a config down
BUILDS = ("_target_", "_partial_", "_args_", "_recursive_", "_convert_")  # what makes a table something that is built


def plain(node: Any, *, resolve: bool = False) -> dict[str, Any]:
    """Return a config node as a dict; interpolations stay as they are typed unless `resolve`."""
    container = OmegaConf.to_container(node, resolve=resolve)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def below(node: Any, steps: Steps) -> Iterator[tuple[Steps, Any]]:
    """Yield steps and content of a node and of all below it, targets and the like apart.

    Args:
        node: a plain config, or what stands in one.
        steps: to that node.
    """
    yield steps, node
    if isinstance(node, Mapping):
        for key, value in node.items():
            if key not in ("_target_", "_partial_"):
                yield from below(value, (*steps, str(key)))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from below(value, (*steps, index))


def texts_of(node: Any) -> Iterator[str]:
    """Yield every text at and below a node, targets and the like apart."""
    return (value for _, value in below(node, ()) if isinstance(value, str))


def nests(node: Any) -> bool:
    """Return whether something that is built lies at or below a node."""
    return any(isinstance(value, Mapping) and "_target_" in value for _, value in below(node, ()))


def at(node: Any, steps: Iterable[str | int]) -> Any:
    """Return what stands at the end of steps, None where nothing does; an interpolation on the way is what stands."""
    for step in steps:
        if isinstance(node, Mapping):
            node = node.get(step)
        elif isinstance(node, list) and str(step).isdecimal() and int(step) < len(node):
            node = node[int(step)]
        else:
            return node if isinstance(node, str) and "${" in node else None
    return node


def resolved(node: Any, steps: Iterable[Any]) -> Any:
    """Return what stands at the end of steps in an OmegaConf config, resolved and plain; None for what cannot be had.

    What lies below is looked at one by one, so that a value that cannot be resolved takes no other with it.
    """
    try:
        for step in steps:
            node = node[step]
    except (OmegaConfBaseException, LookupError, TypeError):
        return None
    if isinstance(node, DictConfig):
        return {key: resolved(node, (key,)) for key in node}
    return [resolved(node, (index,)) for index in range(len(node))] if isinstance(node, ListConfig) else node


def dotted(steps: Steps) -> str:
    """Return steps as they are typed."""
    return ".".join(map(str, steps)) or "its root"


def keys_of(node: Mapping[Any, Any], above: str = "") -> Iterator[str]:
    """Yield the dotted names of all keys; the items of lists have none."""
    for key, value in node.items():
        yield f"{above}{key}"
        if isinstance(value, Mapping):
            yield from keys_of(value, f"{above}{key}.")


def has_key(node: Any, name: str) -> bool:
    """Return whether there is a dotted name, in which the items of a list are numbers."""
    for part in name.split("."):
        items = node if isinstance(node, Mapping) else dict(enumerate(node)) if isinstance(node, list) else {}
        by_name = {str(key): value for key, value in items.items()}
        if part not in by_name:
            return False
        node = by_name[part]
    return True
