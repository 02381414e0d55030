"""Validation of data that is read back from disk: each value is checked against the form in which it is written.

A form is called with a value and its location in the data. It returns nothing, and raises for an invalid value.
"""

import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dinoseg.utils.files import open_regular
from dinoseg.utils.wording import format_value

Form = Callable[[Any, str], None]
_LARGEST = 2**63 - 1
_GREATEST = sys.float_info.max  # larger integers in JSON cannot become a float


class SchemaError(ValueError):
    """Error for data that does not have the form in which it is written; names the location and the value."""


class _ValueForm:
    """Form of a value: its valid values, and the forms of the values in it.

    Args:
        rule: what a valid value is, for the message.
        is_valid: whether a value is, apart from the values in it.
        parts: returns the location in a valid value, the value and the form of each value in it.

    Raises:
        SchemaError: when it is called with another value; names its location.
    """

    def __init__(
        self,
        rule: str,
        is_valid: Callable[[Any], bool],
        parts: Callable[[Any], Iterable[tuple[str, Any, Form]]] = lambda value: (),
    ) -> None:
        self.rule, self.is_valid, self.parts = rule, is_valid, parts

    def __call__(self, value: Any, where: str) -> None:
        if not self.is_valid(value):
            raise SchemaError(f"{where:.99} is {format_value(value, 60)}; it must be {self.rule}")
        for place, part, form in self.parts(value):
            form(part, f"{where}{place}")


def read_json(path: Path, form: Form) -> Any:
    """Read a JSON file, and check it against a form.

    Raises:
        OSError: if the file is missing or cannot be read.
        UserError: if it is no regular file, but a pipe, for example.
        SchemaError: if it is no JSON, or of another form.
    """
    return parse_json(read_regular(path), form)


def read_regular(path: str | Path) -> bytes:
    """Return the content of a regular file.

    Raises:
        UserError: if it is no regular file, but a pipe, for example.
        OSError: if the file is missing or cannot be read.
    """
    with open_regular(path) as file:
        return file.read()


def parse_json(text: str | bytes, form: Form) -> Any:
    """Parse JSON text with unique keys, and check it against a form.

    Raises:
        SchemaError: if the text is no JSON, or of another form.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise SchemaError(str(error)) from None
    form(value, "it")
    return value


def as_read_back(value: Any) -> Any:
    """Return a plain value as `parse_json` returns it: tuples as lists, keys as text."""
    return json.loads(json.dumps(value))


def whole(least: int = 0, most: int = _LARGEST) -> Form:
    """Return the form of an integer in a range."""
    return _ValueForm(
        f"a whole number from {least} to {most}", lambda value: type(value) is int and least <= value <= most
    )


def number(least: float = -_GREATEST, most: float = _GREATEST) -> Form:
    """Return the form of a number in a range, which is no NaN."""
    return _ValueForm(
        f"a number from {least} to {most}", lambda value: type(value) in (int, float) and least <= value <= most
    )


text = _ValueForm("text", lambda value: isinstance(value, str))
flag = _ValueForm("true or false", lambda value: isinstance(value, bool))
bit = _ValueForm("0, 1, true or false", lambda value: type(value) in (int, bool) and value in (0, 1))
integer = _ValueForm("a whole number of 64 bits", lambda value: type(value) is int and -_LARGEST <= value <= _LARGEST)
plain = _ValueForm("any value", lambda value: True)


def max_depth(most: int) -> Form:
    """Return the form of any value that is nested at most `most` levels deep."""
    return _ValueForm(f"nested at most {most} levels deep", lambda value: _depth(value, most) <= most)


def maybe(form: Form) -> Form:
    """Return the form of null or a value of another form."""
    return lambda value, where: None if value is None else form(value, where)


def list_of(form: Form, length: int | None = None) -> Form:
    """Return the form of a list of values of one form, with a given length or any."""
    return _ValueForm(
        "a list" if length is None else f"a list of {length}",
        lambda value: isinstance(value, list) and length in (None, len(value)),
        lambda value: ((f"[{position}]", item, form) for position, item in enumerate(value)),
    )


def row(*forms: Form) -> Form:
    """Return the form of a list with one form for each position."""
    return _ValueForm(
        f"a list of {len(forms)}",
        lambda value: isinstance(value, list) and len(value) == len(forms),
        lambda value: ((f"[{position}]", value[position], form) for position, form in enumerate(forms)),
    )


def table(form: Form, names: str = ".*") -> Form:
    """Return the form of an object whose keys match a regular expression and whose values have one form."""
    return _ValueForm(
        "an object" if names == ".*" else f"an object with keys like {names}",
        lambda value: isinstance(value, dict) and all(re.fullmatch(names, key, re.DOTALL) for key in value),
        lambda value: ((f".{key:.60}", entry, form) for key, entry in value.items()),  # nested entries repeat the key
    )


def record(**forms: Form) -> Form:
    """Return the form of an object with exactly these keys."""
    return _ValueForm(
        f"an object of {', '.join(forms)}",
        lambda value: isinstance(value, dict) and value.keys() == forms.keys(),
        lambda value: ((f".{key}", value[key], form) for key, form in forms.items()),
    )


def some_of(**forms: Form) -> Form:
    """Return the form of an object with some of these keys, and no other."""
    return _ValueForm(
        f"an object of some of {', '.join(forms)}",
        lambda value: isinstance(value, dict) and value.keys() <= forms.keys(),
        lambda value: ((f".{key}", entry, forms[key]) for key, entry in value.items()),
    )


def object_with(**forms: Form) -> Form:
    """Return the form of an object with at least these keys."""
    return _ValueForm(
        f"an object with {', '.join(forms)}",
        lambda value: isinstance(value, dict) and forms.keys() <= value.keys(),
        lambda value: ((f".{key}", value[key], form) for key, form in forms.items()),
    )


def read_flag(entry: Mapping[str, Any], key: str, where: str = "its") -> bool:
    """Return an optional flag of an object, such as COCO's `iscrowd`; without it, False.

    Raises:
        SchemaError: it is not 0, 1, true or false; names `where` and the key.
    """
    value = entry.get(key, False)
    bit(value, f"{where} {key}")
    return bool(value)


def fits(value: Any, form: Form) -> bool:
    """Return whether a value has a form, for callers that report errors themselves."""
    try:
        form(value, "it")
    except SchemaError:
        return False
    return True


def _depth(value: Any, most: int) -> int:
    """Return how many levels deep a value is nested, or a number above `most`."""
    level, depth = [value], 0  # level by level: recursion would exceed Python's stack
    while level and depth <= most:
        level = [inner for outer in level for inner in _values(outer)]
        depth += 1
    return depth


def _values(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):  # parsers differ in which of the two wins
        raise SchemaError("a name occurs twice in one object")
    return entries
