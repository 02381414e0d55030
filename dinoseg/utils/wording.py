"""How messages list names, count things, guess what was meant, and show names that are no text."""

import difflib
import textwrap
from collections.abc import Collection, Mapping, Sequence
from itertools import islice
from typing import Any, TextIO

_DIRECTIONS = (*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x061C, 0x200E, 0x200F)  # text would run backwards
_CONTROLS = (*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029, *_DIRECTIONS)
_SHOWN = {code: chr(code).encode("unicode_escape").decode() for code in _CONTROLS if chr(code) not in "\n\t"}
_SHOWN |= {code: f"\\u{code:04x}" for code in range(0xD800, 0xE000)}
_SHOWN |= {0xDC00 + byte: f"\\x{byte:02x}" for byte in range(0x80, 0x100)}  # how Python holds what is no UTF-8


def listed(names: Sequence[str], limit: int = 5) -> str:
    """Return the first names, and how many more there are."""
    shown = ", ".join(map(one_line, names[:limit]))
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def reasons(bad: Mapping[str, str], limit: int = 20) -> str:
    """Return a line for each of the first names with its reason, then further names."""
    lines = "".join(f"\n- {one_line(f'{name}: {reason}')}" for name, reason in islice(bad.items(), limit))
    rest = list(bad)[limit:]
    return lines + (f"\nand {len(rest)} more: {listed(rest, 5 * limit)}" if rest else "")


def count_of(things: Collection | int, noun: str, plural: str | None = None) -> str:
    """Return `1 image` or `2 images`; `plural` where it is more than an added s."""
    count = things if isinstance(things, int) else len(things)
    return f"{count} {noun}" if count == 1 else f"{count} {plural or noun + 's'}"


def in_bytes(size: int) -> str:
    """Return `2.50 GiB` or `3.1 MiB`."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def nearest(word: str, known: Sequence[str], before: str = "") -> str:
    """Return the question whether the nearest of the known words was meant, the same last part first; "" for none."""
    last = word.rsplit(".", 1)[-1]
    same = [key for key in known if key.rsplit(".", 1)[-1] == last]
    found = (same or difflib.get_close_matches(word, known, n=3, cutoff=0.75))[:3]
    return f" Did you mean {' or '.join(before + each for each in found)}?" if found else ""


def printable(text: str) -> str:
    r"""Return text that can be shown: what is no UTF-8 in a file's name, or would steer a terminal, stands as `\x1b`.

    Line breaks and tabs stay: our own messages have them.
    """
    return text.translate(_SHOWN)


def one_line(text: str) -> str:
    r"""Return text for a list with a line for each entry: a line break in a file's name stands as `\n`."""
    return text.replace("\n", "\\n")


def in_lines(name: str, width: int, most: int = 3) -> str:
    """Return a name as a picture shows it: in lines of `width` letters, and of more than `most` the last ones."""
    lines = textwrap.wrap(one_line(printable(name)), width, break_on_hyphens=False)
    return "\n".join(lines if len(lines) <= most else [f"...{lines[-most][3:]}", *lines[1 - most :]])


class Printable:
    """A text stream to which all that is written is made `printable`; else the stream itself."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write it."""
        return self._stream.write(printable(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def typed(value: Any) -> str:
    """Return a plain value as a command line has it, such as `null`, `true` or `[a,b]`."""
    if isinstance(value, list | tuple):
        return f"[{','.join(map(typed, value))}]"
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else shown(str(value), 200)


def shown(value: Any, limit: int = 80) -> str:
    """Return a value that a file says, for a message: one line, nothing that a terminal obeys, and not long."""
    text = value if isinstance(value, str) and value.isprintable() else ascii(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
