"""A config node to what it describes: the only caller of hydra's instantiate; imports no torch."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate as hydra_instantiate
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dinoseg.checks import check_given, targets
from dinoseg.errors import UserError


def instantiate(node: Any, *, without: Sequence[str] = (), instead: Mapping[str, Any] | None = None) -> Any:
    """Return what a config node describes; a `_partial_` node gives a callable that waits for the rest.

    Args:
        node: a config node or a dict, with `_target_`.
        without: keys beside it that are for somebody else.
        instead: values to use in place of the node's own.

    Raises:
        UserError: a value is missing, or a key or its value is not one that the target takes.
    """
    try:
        values: Any = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    except OmegaConfBaseException as error:
        raise UserError(str(error) if isinstance(error, UserError) else _missing(error)) from None
    values = {key: value for key, value in values.items() if key not in without} | dict(instead or {})
    unset = next(_unset(values, node._get_full_key(None) if OmegaConf.is_config(node) else ""), None)
    if unset:
        raise UserError(not_set(unset))
    again = next((text for text in _texts(values) if "${" in text), None)
    if again is not None:  # hydra would resolve it once more, and so run what was meant as text
        raise UserError(f"{again} reads as an interpolation even after it is resolved. Choose a value without ${{.")
    for target, given in targets(values):
        check_given(target, given)
    try:
        return hydra_instantiate(values, _convert_="all")
    except InstantiationException as error:
        raise (error.__cause__ or error) from None  # what the target itself raised, not hydra's wrapping


def not_set(key: str) -> str:
    """Return the message for a key without a value."""
    return f"{key} is not set. Give it on the command line: {key}=VALUE."


def _unset(values: Any, where: str) -> Iterator[str]:
    """Yield the whole names of the values that still stand as `???`."""
    if values == "???":
        yield where
    items = values.items() if isinstance(values, Mapping) else enumerate(values) if isinstance(values, list) else ()
    for key, value in items:
        yield from _unset(value, f"{where}.{key}".lstrip("."))


def _texts(values: Any) -> Iterator[str]:
    if isinstance(values, str):
        yield values
    for value in values.values() if isinstance(values, Mapping) else values if isinstance(values, list) else ():
        yield from _texts(value)


def _missing(error: OmegaConfBaseException) -> str:
    absent = re.search(r"Missing mandatory value: (\S+)", str(error))
    if absent:
        return not_set(absent[1])
    key = getattr(error, "full_key", None) or "The config"
    return f"{key} cannot be resolved: {str(error).strip().splitlines()[0]}."
