"""What runs are told apart by in a table: their choices, and the values of what is trained and how."""

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig

from dinoseg.config.plain import plain
from dinoseg.training.description import CHOSEN, MODEL


def settings_of(cfg: DictConfig) -> dict[str, Any]:
    """Return them under full names, such as `optim.optimizer.lr`."""
    groups = {group: plain(cfg[group], resolve=True) for group in ("resolution", *MODEL)}
    choices = {group: cfg.choices[group] for group in CHOSEN}
    return _flat({"seed": cfg.seed, "choices": choices, "data": {"batch_size": cfg.data.batch_size}, **groups})


def _flat(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in node.items():
        if isinstance(value, Mapping):
            values |= _flat(value, f"{prefix}{key}.")
        elif not str(key).startswith("_"):
            values[f"{prefix}{key}"] = value if isinstance(value, int | float) else str(value)
    return values
