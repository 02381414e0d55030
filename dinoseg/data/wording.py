"""How messages list names: the first few, and how many there are."""

from collections.abc import Collection, Sequence


def listed(names: Sequence[str], limit: int = 5) -> str:
    """Return the first names, and how many more there are."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def count_of(things: Collection, noun: str) -> str:
    """Return `1 image` or `2 images`."""
    return f"{len(things)} {noun}" if len(things) == 1 else f"{len(things)} {noun}s"
