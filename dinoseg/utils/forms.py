"""Validation of data that is read back from disk: each value is checked against the form in which it is written.

A form is a function of a value and its location in the data. It returns nothing, and raises for an invalid value.
"""

import json
import math
import os
import re
import sys
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

import numpy as np

from dinoseg.utils.cores import machine_memory
from dinoseg.utils.files import open_regular
from dinoseg.utils.wording import ESCAPED_BYTES, has_surrogates

Form = Callable[[Any, str], None]
_DEEPEST = 16  # nesting levels of a `plain` value
_LARGEST = 2**63 - 1
_MAX_BYTES = 2**32  # of a JSON file; a sparse one may claim more than any memory
_SMALL = 2**26  # bytes of a file that any machine can read
_GREATEST = sys.float_info.max  # larger integers in JSON cannot become a float


class SchemaError(ValueError):
    """Error for data that does not have the form in which it is written; names the location and the value."""


def read_json(path: Path, form: Form, *, most: int = _MAX_BYTES) -> Any:
    """Read a JSON file of at most `most` bytes, and check it against a form.

    Raises:
        OSError: if the file is missing or cannot be read.
        UserError: if it is no regular file, but a pipe, for example.
        SchemaError: if it is no JSON, of another form, or larger.
    """
    return parse_json(read_regular(path, most), form)


def read_regular(path: str | Path, most: int) -> bytes:
    """Return the content of a regular file of at most `most` bytes.

    Raises:
        UserError: if it is no regular file, but a pipe, for example.
        SchemaError: if it is larger, or would take a quarter of this machine's memory.
        OSError: if the file is missing or cannot be read.
    """
    with open_regular(path) as file:
        _check_size(file, most)
        return file.read(most)


def parse_json(text: str | bytes, form: Form, *, finite: bool = True) -> Any:
    """Parse JSON text with finite numbers and unique keys, and check it against a form.

    Args:
        text: of JSON.
        form: the required form.
        finite: refuse numbers beyond the range of floats; without it, parsing is twice as fast for long texts, and the
            caller has to check them.

    Raises:
        SchemaError: if the text is no such JSON, or of another form.
    """
    try:
        value = json.loads(
            text, object_pairs_hook=_unique, parse_constant=_no_number, parse_float=_finite if finite else None
        )
    except UnicodeDecodeError as error:
        raise SchemaError(f"byte {error.start} is not valid {error.encoding}: save it as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise SchemaError(str(error) or "it is nested too deeply") from None
    raw = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    if b"\\ud" in raw or b"\\uD" in raw:
        refuse_surrogates(value)
    form(value, "it")
    return value


def refuse_surrogates(value: Any) -> None:
    """Raise a SchemaError if a text in a plain value holds a lone surrogate that no file name can hold.

    Python keeps the bytes of a file name that are no UTF-8 as U+DC80 to U+DCFF; caches may hold such names.
    """
    level: list[Any] = [value]  # level by level: recursion would exceed Python's stack
    while level:
        texts = [each for each in level if isinstance(each, str)]
        texts += [key for each in level if isinstance(each, dict) for key in each if isinstance(key, str)]
        if odd := [each for each in texts if has_surrogates(each.translate(ESCAPED_BYTES))]:
            raise SchemaError(f"{odd[0]!a:.60} holds half of a surrogate pair: save it as valid Unicode")
        level = [inner for outer in level for inner in _values(outer)]


def as_read_back(value: Any) -> Any:
    """Return a plain value as `parse_json` returns it: tuples as lists, keys as text."""
    return json.loads(json.dumps(value))


class ArrayForm(NamedTuple):
    """Form of an array in an NPZ file."""

    kind: str  # data type, such as `<f8`
    axes: int
    most: int  # maximum number of bytes


def read_arrays(path: Path, forms: Mapping[str, ArrayForm], *, most: int = _MAX_BYTES) -> dict[str, np.ndarray]:
    """Read the arrays of an NPZ file that was written without compression.

    Args:
        path: the file.
        forms: name to form; the header of an array is checked before its values are read.
        most: bytes that the file may have.

    Raises:
        OSError: if the file is missing or cannot be read.
        UserError: if it is no regular file, but a pipe, for example.
        SchemaError: if it is damaged or too large, or an array is missing or not of its form.
    """
    with open_regular(path) as file:
        _check_size(file, most)
        try:
            with zipfile.ZipFile(file) as archive:
                return {name: _array(archive, name, form) for name, form in forms.items()}
        except SchemaError:
            raise
        except Exception as error:  # a damaged archive raises many exception types
            raise SchemaError(
                str(error)[:200] or type(error).__name__
            ) from None  # the message may quote the whole file


def whole(least: int = 0, most: int = _LARGEST) -> Form:
    """Return the form of an integer in a range."""

    def check(value: Any, where: str) -> None:
        if type(value) is not int or not least <= value <= most:
            _refuse(value, where, f"a whole number from {least} to {most}")

    return check


def number(least: float = -_GREATEST, most: float = _GREATEST) -> Form:
    """Return the form of a number in a range."""

    def check(value: Any, where: str) -> None:
        if type(value) not in (int, float) or not least <= value <= most:
            _refuse(value, where, f"a number from {least} to {most}")

    return check


def text(value: Any, where: str) -> None:
    """Check that a value is text."""
    if not isinstance(value, str):
        _refuse(value, where, "text")


def flag(value: Any, where: str) -> None:
    """Check that a value is a boolean."""
    if type(value) is not bool:
        _refuse(value, where, "true or false")


def max_depth(most: int) -> Form:
    """Return the form of any value that is nested at most `most` levels deep."""

    def check(value: Any, where: str) -> None:
        level: list[Any] = [value]  # level by level: recursion would exceed Python's stack
        for _ in range(most):
            level = [inner for outer in level for inner in _values(outer)]
        if level:
            raise SchemaError(f"{where:.99} is nested too deeply")

    return check


def plain(value: Any, where: str) -> None:
    """Check that a value is nested only a few levels deep, whatever it holds."""
    max_depth(_DEEPEST)(value, where)


def maybe(form: Form) -> Form:
    """Return the form of null or a value of another form."""
    return lambda value, where: None if value is None else form(value, where)


def list_of(form: Form, length: int | None = None) -> Form:
    """Return the form of a list of values of one form, with a given length or any."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, list) or length not in (None, len(value)):
            _refuse(value, where, "a list" if length is None else f"a list of {length}")
        for position, item in enumerate(value):
            form(item, f"{where}[{position}]")

    return check


def row(*forms: Form) -> Form:
    """Return the form of a list with one form for each position."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, list) or len(value) != len(forms):
            _refuse(value, where, f"a list of {len(forms)}")
        for position, (form, item) in enumerate(zip(forms, value, strict=True)):
            form(item, f"{where}[{position}]")

    return check


def table(form: Form, names: str = ".*") -> Form:
    """Return the form of an object whose keys match a regular expression and whose values have one form."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, dict):
            _refuse(value, where, "an object")
        for key, entry in value.items():
            if re.fullmatch(names, key, re.DOTALL) is None:
                raise SchemaError(f"{where:.99} has an unknown entry {key!r:.60}")
            form(entry, f"{where}.{key:.60}")  # shortened: nested entries repeat it

    return check


def record(**forms: Form) -> Form:
    """Return the form of an object with exactly these keys."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, dict) or value.keys() != forms.keys():
            _refuse(value, where, f"an object of {', '.join(forms)}")
        object_with(**forms)(value, where)

    return check


def some_of(**forms: Form) -> Form:
    """Return the form of an object with some of these keys, and no other."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, dict) or not value.keys() <= forms.keys():
            _refuse(value, where, f"an object of some of {', '.join(forms)}")
        object_with(**{key: forms[key] for key in value})(value, where)

    return check


def object_with(**forms: Form) -> Form:
    """Return the form of an object with at least these keys."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, dict) or not forms.keys() <= value.keys():
            _refuse(value, where, f"an object with {', '.join(forms)}")
        for key, form in forms.items():
            form(value[key], f"{where}.{key}")

    return check


def fits(value: Any, form: Form) -> bool:
    """Return whether a value has a form, for callers that report errors themselves."""
    try:
        form(value, "it")
    except SchemaError:
        return False
    return True


def _refuse(value: Any, where: str, rule: str) -> NoReturn:
    raise SchemaError(f"{where:.99} is {value!r:.60}; it must be {rule}")


def _values(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _check_size(file: BinaryIO, most: int) -> None:
    """Refuse an open file above a size; a sparse one may claim any size, and be read as zeros."""
    size = os.fstat(file.fileno()).st_size
    if size > _SMALL:
        most = min(most, machine_memory() // 4)
    if size > most:
        raise SchemaError(f"it has {size} bytes; the limit is {most}")


def _array(archive: zipfile.ZipFile, name: str, form: ArrayForm) -> np.ndarray:
    info = archive.getinfo(f"{name}.npy")
    if info.compress_type != zipfile.ZIP_STORED:
        raise SchemaError(f"{name} is compressed")
    with archive.open(info) as file:
        if np.lib.format.read_magic(file) != (1, 0):
            raise SchemaError(f"{name} has another version of the format")
        shape, by_columns, dtype = np.lib.format.read_array_header_1_0(file)
        size = info.file_size - file.tell()
        is_of_kind = not by_columns and dtype.str == form.kind and len(shape) == form.axes
        if not is_of_kind or math.prod(shape) * dtype.itemsize != size or size > form.most:
            raise SchemaError(
                f"{name} is {dtype.str}{list(shape)} in {size} bytes; it must be {form.kind} with {form.axes} axes "
                f"in at most {form.most}"
            )
        content = file.read()
    return np.frombuffer(content, dtype).reshape(shape)


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):  # parsers differ in which of the two wins
        raise SchemaError("a name occurs twice in one object")
    return entries


def _no_number(name: str) -> NoReturn:
    raise SchemaError(f"{name} is not a number")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise SchemaError(f"{digits:.20} is not a number")
    return value
