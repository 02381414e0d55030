"""What a feature pyramid of timm runs between one map and the next."""

from collections.abc import Sequence

from torch import nn


def stages(model: nn.Module, taps: Sequence[str]) -> list[nn.Module]:
    """Return one list of modules for each tap, in order: what runs after the tap before it up to this one.

    The order is that in which the model registered its modules. Where timm's notes name no module of the model, the
    whole model is the one stage.

    Args:
        model: a model whose top modules, or the parts of those that are lists, run one after another.
        taps: names of the modules whose output is a map, in order.
    """
    units = _units(model)
    ends = [_end(list(units), tap) for tap in taps]
    if 0 in ends or ends != sorted(set(ends)):
        return [model]
    parts = list(units.values())
    return [nn.ModuleList(parts[start:end]) for start, end in zip([0, *ends], ends, strict=False)]


def _units(model: nn.Module) -> dict[str, nn.Module]:
    units: dict[str, nn.Module] = {}
    for name, child in model.named_children():
        inner = dict(child.named_children()) if isinstance(child, nn.Sequential | nn.ModuleList) else {}
        units |= {f"{name}.{number}": part for number, part in inner.items()} or {name: child}
    return units


def _end(units: Sequence[str], tap: str) -> int:
    """Return the position after the last unit that is the tap, holds it or lies in it, or 0."""
    inside = [
        number
        for number, unit in enumerate(units)
        if f"{tap}.".startswith(f"{unit}.") or f"{unit}.".startswith(f"{tap}.")
    ]
    return inside[-1] + 1 if inside else 0
