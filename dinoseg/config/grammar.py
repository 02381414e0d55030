"""Plain values in Hydra's grammar of overrides, and back."""

import re
from collections.abc import Mapping
from typing import Any

from hydra.core.override_parser.types import Quote, QuotedString

# text that needs no quotes; Hydra's grammar knows the letters of ASCII
_PLAIN = re.compile(r"(?!(null|true|false|nan|inf)$)[a-z_][\w./-]*", re.IGNORECASE | re.ASCII)
_UNSAFE = re.compile(r"^.|\W", re.ASCII | re.DOTALL)  # the first character too: {1: 2} has a number as its key
_ESCAPE = re.compile(r"\\u([0-9a-f]{4})|\\U([0-9a-f]{8})")


def write_value(value: Any) -> str:
    """Return a plain value as typed after `KEY=`; text is quoted unless it is plain ASCII."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{_write_key(name)}:{write_value(each)}" for name, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(write_value, value)) + "]"
    if isinstance(value, str):
        return value if _PLAIN.fullmatch(value) else QuotedString(value, Quote.double).with_quotes()
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)


def _write_key(name: Any) -> str:
    """Return a key of a dict, with escapes as in JSON unless it is plain: the grammar has no quotes for keys."""

    def escape(character: re.Match[str]) -> str:
        code = ord(character[0])
        return f"\\u{code:04x}" if code < 2**16 else f"\\U{code:08x}"

    is_plain = not isinstance(name, str) or _PLAIN.fullmatch(name)
    return str(name) if is_plain else _UNSAFE.sub(escape, name)


def decode_keys(value: Any) -> Any:
    """Return a value that Hydra has parsed, with the keys of its dicts as they were before `write_value`."""
    if isinstance(value, Mapping):
        return {_decode(name): decode_keys(each) for name, each in value.items()}
    return [decode_keys(each) for each in value] if isinstance(value, list) else value


def _decode(name: Any) -> Any:
    return _ESCAPE.sub(lambda code: chr(int(code[1] or code[2], 16)), name) if isinstance(name, str) else name
