"""What every reader of a config shares: plain dicts, and the one resolver."""

from typing import Any

from omegaconf import OmegaConf


def plain(node: Any, *, resolve: bool = False) -> dict[str, Any]:
    """Return a config node as a dict; interpolations stay as they are typed unless `resolve`."""
    container = OmegaConf.to_container(node, resolve=resolve)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def register_resolvers() -> None:
    """Register `${len:${.classes}}`, the length of a list."""
    OmegaConf.register_new_resolver("len", len, replace=True)
