"""Places in a plain config, by keys and indices: what lies below one, and what its interpolations stand for."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from omegaconf import DictConfig, ListConfig
from omegaconf.errors import OmegaConfBaseException

Steps = tuple[str | int, ...]  # keys and indices


def below(node: Any, place: Steps) -> Iterator[tuple[Steps, Any]]:
    """Yield place and content of a node and of all below it, targets and the like apart."""
    yield place, node
    if isinstance(node, Mapping):
        for key, value in node.items():
            if key not in ("_target_", "_partial_"):
                yield from below(value, (*place, str(key)))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from below(value, (*place, index))


def nests(value: Any) -> bool:
    """Return whether something that is built lies at or below a value."""
    return any(isinstance(node, Mapping) and "_target_" in node for _, node in below(value, ()))


def at(node: Any, place: Steps) -> Any:
    """Return what stands at a place of a plain config, None where nothing does; a text on the way is what stands."""
    for key in place:
        if isinstance(node, Mapping):
            node = node.get(key)
        elif isinstance(node, list) and str(key).isdecimal() and int(key) < len(node):
            node = node[int(key)]
        else:
            return node if isinstance(node, str) and "${" in node else None
    return node


def resolved(node: Any, place: Iterable[Any]) -> Any:
    """Return what stands at a place of a config once its interpolations are resolved, None for what cannot be had."""
    try:
        for key in place:
            node = node[key]
    except (OmegaConfBaseException, LookupError, TypeError):
        return None
    if isinstance(node, DictConfig):
        return {key: resolved(node, (key,)) for key in node}
    return [resolved(node, (index,)) for index in range(len(node))] if isinstance(node, ListConfig) else node


def dotted(place: Steps) -> str:
    """Return a place as it is typed."""
    return ".".join(map(str, place)) or "its root"
