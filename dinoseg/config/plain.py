"""Access to plain configs (dicts and lists) by keys and indices, or by dotted names."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

KeyPath = tuple[str | int, ...]  # keys and indices, from the root of a config down
BUILDS = ("_target_", "_partial_", "_args_", "_recursive_", "_convert_")  # of tables that build objects


def to_container(node: Any, *, resolve: bool = False) -> dict[str, Any]:
    """Return a config node as a dict; interpolations stay unresolved unless `resolve`."""
    container = OmegaConf.to_container(node, resolve=resolve)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def walk(node: Any, key_path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Yield path and content of a node and everything below it.

    Args:
        node: a plain config, or a part of one.
        key_path: path to that node.
    """
    yield key_path, node
    items: Any = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield from walk(value, (*key_path, key))


def flatten(node: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted key and the value of each leaf of nested mappings; an empty mapping is a leaf."""
    for key, value in node.items():
        # an empty mapping is a value: it would vanish otherwise
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def texts_of(node: Any) -> Iterator[str]:
    """Yield every text at and below a node."""
    return (value for _, value in walk(node) if isinstance(value, str))


def nests(node: Any) -> bool:
    """Return whether a `_target_` is at or below a node."""
    return any(isinstance(value, Mapping) and "_target_" in value for _, value in walk(node))


def value_at(node: Any, key_path: Iterable[str | int]) -> Any:
    """Return the content at the end of `key_path`; None if there is none.

    An interpolation on the way is returned itself.
    """
    for step in key_path:
        if isinstance(node, Mapping):
            node = node.get(step)
        elif isinstance(node, list) and str(step).isdecimal() and int(step) < len(node):
            node = node[int(step)]
        else:
            return node if isinstance(node, str) and "${" in node else None
    return node


def resolve_node(node: Any, key_path: Iterable[Any]) -> Any:
    """Return the content at the end of `key_path` in an OmegaConf config, resolved and plain; None if that fails.

    Values below are resolved one by one, so that one that cannot be resolved does not affect the others.
    """
    try:
        for step in key_path:
            node = node[step]
    except (OmegaConfBaseException, LookupError, TypeError):
        return None
    if isinstance(node, DictConfig):
        return {key: resolve_node(node, (key,)) for key in node}
    return [resolve_node(node, (index,)) for index in range(len(node))] if isinstance(node, ListConfig) else node


def dotted_name(key_path: KeyPath) -> str:
    """Return a key path as typed."""
    return ".".join(map(str, key_path)) or "its root"


def keys_of(node: Mapping[Any, Any], above: str = "") -> Iterator[str]:
    """Yield the dotted names of all keys; items of lists have none."""
    for key, value in node.items():
        yield f"{above}{key}"
        if isinstance(value, Mapping):
            yield from keys_of(value, f"{above}{key}.")


def has_key(node: Any, name: str) -> bool:
    """Return whether a dotted name exists; items of a list are numbers in it."""
    for part in name.split("."):
        items = node if isinstance(node, Mapping) else dict(enumerate(node)) if isinstance(node, list) else {}
        by_name = {str(key): value for key, value in items.items()}
        if part not in by_name:
            return False
        node = by_name[part]
    return True


def is_below(key: str, names: Collection[str]) -> bool:
    """Return whether a dotted key is one of some names, or below one."""
    return any(key == name or key.startswith(f"{name}.") for name in names)
