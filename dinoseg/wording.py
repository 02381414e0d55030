"""How messages list names, count things, and show names that are no text."""

from collections.abc import Collection, Sequence


def listed(names: Sequence[str], limit: int = 5) -> str:
    """Return the first names, and how many more there are."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def count_of(things: Collection | int, noun: str, plural: str | None = None) -> str:
    """Return `1 image` or `2 images`; `plural` where it is more than an added s."""
    count = things if isinstance(things, int) else len(things)
    return f"{count} {noun}" if count == 1 else f"{count} {plural or noun + 's'}"


def printable(text: str) -> str:
    r"""Return text that can be written as UTF-8: the bytes of a file name that are none stand as `\xff`."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
