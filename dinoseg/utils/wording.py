"""Text helpers for messages: lists, counts, suggestions, escaping of unprintable names, URLs without passwords."""

import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

MAX_LISTED = 3  # lines with files in a message: with more, the remedy below them is not seen
_SURROGATE = re.compile("[\ud800-\udfff]")
# scheme://USER:PASSWORD@ or scheme://TOKEN@. A password may hold unescaped / ? # and @: what follows the first colon is
# a password, unless it is a port. [ begins an IPv6 address.
_CREDENTIALS = re.compile(r"(?i)\b([a-z][a-z0-9+.-]*://)(?:[^/\s?#:@[]*:(?!\d+(?:[/?#]|$))\S*@|[^/\s?#]*@)")
# text that YAML and Hydra read as a number, a truth value or null unless it is in quotes
_NOT_TEXT = re.compile(r"(?i)null|true|false|[+-]?(?:\d[\d_]*\.?\d*|\.\d+)(?:e[+-]?\d+)?|[+-]?(?:inf|nan)")
_DIRECTIONS = (*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x061C, 0x200E, 0x200F)  # reverse the direction of text
_CONTROLS = (*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029, *_DIRECTIONS)
_SHOWN = {code: chr(code).encode("unicode_escape").decode() for code in _CONTROLS if chr(code) not in "\n\t"}
_SHOWN |= {code: f"\\u{code:04x}" for code in range(0xD800, 0xE000)}
_SHOWN |= {0xDC00 + byte: f"\\x{byte:02x}" for byte in range(0x80, 0x100)}  # surrogates of bytes that are no UTF-8


def join_names(names: Sequence[str], limit: int = 5) -> str:
    """Return the first names, and the number of the others."""
    first = ", ".join(map(one_line, names[:limit]))
    return first if len(names) <= limit else f"{first} and {len(names) - limit} more"


def list_reasons(bad: Mapping[str, str]) -> str:
    """Return one line with the reason for each of the first names, then the number of the others."""
    return list_first([f"{name}: {reason}" for name, reason in bad.items()])


def list_first(lines: Sequence[str], start: str = "- ") -> str:
    """Return the first lines, each after `start`, and the number of the others."""
    shown = "".join(f"\n{start}{one_line(line)}" for line in lines[:MAX_LISTED])
    more = len(lines) - MAX_LISTED
    return shown + (f"\n{start}and {more} more" if more > 0 else "")


def count_of(things: Collection | int, noun: str, plural: str | None = None) -> str:
    """Return a count with its noun, such as `1 image` or `2 images`; `plural` if it is more than an added s."""
    count = things if isinstance(things, int) else len(things)
    return f"{count} {noun}" if count == 1 else f"{count} {plural or noun + 's'}"


def in_bytes(size: float) -> str:
    """Format a size such as `2.50 GiB` or `3.1 MiB`."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def suggest_nearest(word: str, known: Sequence[str], before: str = "") -> str:
    """Return a question that suggests up to three known words; "" for none.

    Similar and longer keys below the same parent come first, then keys with the same last part, longer words with this
    beginning, similar words, and longer words with a similar beginning.
    """
    if not word:
        return ""
    parent, _, last = word.rpartition(".")
    siblings = [key for key in known if parent and key.rpartition(".")[0] == parent]
    found = difflib.get_close_matches(word, siblings, n=1, cutoff=0.9)
    found = found or [key for key in siblings if key.startswith(word)][:3]
    found = found or [key for key in known if key.rsplit(".", 1)[-1] == last][:3]
    found = found or [key for key in known if key.startswith(word)][:3]
    found = found or difflib.get_close_matches(word, known, n=3, cutoff=0.75)
    if not found:
        beginnings = {key: difflib.SequenceMatcher(None, word, key[: len(word)]).ratio() for key in known}
        found = sorted((key for key in known if beginnings[key] >= 0.8), key=lambda key: -beginnings[key])[:3]
    return f" Did you mean {' or '.join(before + each for each in found)}?" if found else ""


def has_surrogates(text: str) -> bool:
    """Return whether text holds lone surrogates: they are no characters, and UTF-8 cannot encode them."""
    return _SURROGATE.search(text) is not None


def printable(text: str) -> str:
    r"""Return text that is safe to show: invalid UTF-8 and control characters are escaped, such as `\x1b`.

    Line breaks and tabs stay: our own messages have them.
    """
    return text.translate(_SHOWN)


def one_line(text: str) -> str:
    r"""Return text with line breaks escaped as `\n`, for lists with one entry per line."""
    return text.replace("\n", "\\n")


def format_override(value: Any) -> str:
    """Format a plain value as on the command line, such as `null`, `[a,b]`, or `'1'` for text that looks typed."""
    if isinstance(value, list | tuple):
        return f"[{','.join(map(format_override, value))}]"
    if isinstance(value, str) and _NOT_TEXT.fullmatch(value):
        return repr(value)
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else format_text(str(value), 200)


def format_value(value: Any, limit: int = 80) -> str:
    """Format a value of any type for a message as Python does, text in quotes: `'8'` or `8`.

    The result is one line of at most `limit` characters.
    """
    return _shorten(one_line(repr(value)), limit)


def format_text(text: str, limit: int = 80) -> str:
    """Format a name, a path or other text for a message without quotes: one line of at most `limit` characters."""
    return _shorten(text if text.isprintable() else ascii(text), limit)


def _shorten(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def has_credentials(text: str) -> bool:
    """Return whether text holds a URL with a user or a password, such as `https://USER:PASSWORD@HOST`."""
    return _CREDENTIALS.search(text) is not None


def without_credentials(text: str) -> str:
    """Return text with users and passwords removed from its URLs.

    Everything up to the last @ of a URL with a colon is removed, as an unescaped password may hold any character.
    """
    return _CREDENTIALS.sub(r"\1", text)
