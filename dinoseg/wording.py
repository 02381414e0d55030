"""How messages list names, count things, guess what was meant, and show names that are no text."""

import difflib
from collections.abc import Collection, Sequence


def listed(names: Sequence[str], limit: int = 5) -> str:
    """Return the first names, and how many more there are."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def count_of(things: Collection | int, noun: str, plural: str | None = None) -> str:
    """Return `1 image` or `2 images`; `plural` where it is more than an added s."""
    count = things if isinstance(things, int) else len(things)
    return f"{count} {noun}" if count == 1 else f"{count} {plural or noun + 's'}"


def nearest(word: str, known: Sequence[str], before: str = "") -> str:
    """Return the question whether the nearest of the known words was meant, the same last part first; "" for none."""
    last = word.rsplit(".", 1)[-1]
    same = [key for key in known if key.rsplit(".", 1)[-1] == last]
    found = (same or difflib.get_close_matches(word, known, n=3, cutoff=0.75))[:3]
    return f" Did you mean {' or '.join(before + each for each in found)}?" if found else ""


def printable(text: str) -> str:
    r"""Return text that can be written as UTF-8: the bytes of a file name that are none stand as `\xff`."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
