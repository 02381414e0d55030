"""What an ONNX file holds, read before any runtime sees it: nothing but tensors and standard operators is let through.

An ONNX file is a protobuf message. Only its framing is read here, so that no generated code of another package is
needed where models are used; the numbers below are those of the fields in onnx.proto.
"""

import math
import mmap
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath

from dinoseg.errors import UserError

STANDARD = ("", "ai.onnx")  # operator sets that let nothing run but ONNX's own operators
LARGEST_FILE = 2**31 - 1  # of a protobuf message
_MOST_NODES, _MOST_SIDE, _LONGEST_NAME = 200_000, 2**20, 255
_MOST_FIELDS, _MOST_AXES, _LONGEST_TEXT = 2**22, 64, 2**23  # of all messages together; of a tensor; bytes
_BITS = {1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 16: 16, 21: 4, 22: 4}
_EXTERNAL = 1  # of data_location
_EXTERNAL_KEYS = ("location", "offset", "length", "checksum")
_LENGTH_DELIMITED, _VARINT = 2, 0
Field = tuple[int, int | memoryview]  # number, value


class _Damaged(ValueError):
    """The file is no ONNX model, or one that may not be run; says why."""


def read_metadata(path: Path, key: str) -> str:
    """Return the text that a model's metadata holds under `key`, after all of the file has been looked at.

    Raises:
        UserError: it is damaged or no ONNX file, has no such text, names data outside its folder, operators that are
            no standard ones, graphs inside graphs, or tensors that are not in it in full; or it cannot be read.
    """
    return _read(path, key)[0]


def data_beside(path: Path, key: str) -> list[str]:
    """Return the names of the files beside a model in which tensors of it lie; arguments and errors as above."""
    return sorted(_read(path, key)[1])


def _read(path: Path, key: str) -> tuple[str, set[str]]:
    try:
        size = os.path.getsize(path)
        if not path.is_file() or not 0 < size <= LARGEST_FILE:
            raise _Damaged(f"{size} bytes are no such file")
        with open(path, "rb") as file:
            reading = _Reading(path)
            text = reading.model(memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)), key)
            return text, reading.beside
    except (ValueError, OverflowError) as error:
        raise UserError(f"{path}: no ONNX file that dinoseg would run: {error}. Export the model again.") from None
    except OSError as error:
        raise UserError(f"Cannot read {path} ({error.strerror}). Check the path, its disk and that you may.") from error


class _Reading:
    """What is read of one file: so many fields at most, since each costs time, however short it is.

    Args:
        path: of the file; external data lies beside it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.left = _MOST_FIELDS
        self.beside: set[str] = set()  # names of the files that external data lies in

    def model(self, view: memoryview, key: str) -> str:
        """Look at a ModelProto and return what its metadata says under `key`."""
        found, graphs = [], 0
        for number, value in self.fields(view):
            if number == 7:
                graphs += 1
                self.graph(_message(value))
            elif number == 8:
                _refuse_set(self.text(_message(value), 1))
            elif number == 14:
                entry = _message(value)
                found += [self.text(entry, 2)] if self.text(entry, 1) == key else []
            elif number in (20, 25):
                raise _Damaged("it holds functions or training code of its own")
        if graphs != 1:
            raise _Damaged(f"it holds {graphs} graphs")
        if len(found) != 1:
            raise _Damaged("it was not written by dinoseg (mode=export export=onnx)")
        return found[0]

    def graph(self, view: memoryview) -> None:
        """Look at a GraphProto."""
        nodes = 0
        for number, value in self.fields(view):
            if number == 1:
                nodes += 1
                self.node(_message(value))
            elif number == 5:
                self.tensor(_message(value))
            elif number == 11:
                self.input(_message(value))
            elif number == 15:
                raise _Damaged("it holds sparse tensors")
            if nodes > _MOST_NODES:
                raise _Damaged(f"it has more than {_MOST_NODES} nodes")

    def node(self, view: memoryview) -> None:
        """Look at a NodeProto and its attributes."""
        for number, value in self.fields(view):
            if number == 7:
                _refuse_set(_decoded(_message(value)))
            elif number == 5:
                for attribute, inner in self.fields(_message(value)):
                    if attribute in (6, 11):
                        raise _Damaged("it holds graphs inside graphs, which may loop for ever")
                    if attribute in (5, 10):
                        self.tensor(_message(inner))
                    if attribute in (22, 23):
                        raise _Damaged("it holds sparse tensors")

    def input(self, view: memoryview) -> None:
        """Look at the sizes of an input (ValueInfoProto: type 2, tensor 1, shape 2, dimensions 1, of a value 1)."""
        levels = [view]
        for number in (2, 1, 2, 1):
            levels = [_message(value) for level in levels for field, value in self.fields(level) if field == number]
        sides = [value for level in levels for field, value in self.fields(level) if field == 1]
        if any(not isinstance(side, int) or not 0 <= side <= _MOST_SIDE for side in sides):
            raise _Damaged("an input has a size that no picture has")

    def tensor(self, view: memoryview) -> None:
        """Look at a TensorProto: all of its numbers are there."""
        dims: list[int] = []
        kind = location = held = 0
        external: dict[str, str] = {}
        for number, value in self.fields(view):
            if number == 1:
                dims += [value] if isinstance(value, int) else _packed(value)
            elif number == 2:
                kind = _number(value)
            elif number == 14:
                location = _number(value)
            elif number == 13:
                name = self.text(_message(value), 1)
                if name in external or name not in _EXTERNAL_KEYS:
                    raise _Damaged(f"it says {name!r:.60} of its data, which is unknown or stands there twice")
                external[name] = self.text(_message(value), 2)
            elif number == 6:
                raise _Damaged("it holds text")
            elif number in (4, 5, 7, 9, 10, 11):  # packed numbers, or one for each field
                held += len(value) if isinstance(value, memoryview) else 1
        if kind not in _BITS or len(dims) > _MOST_AXES or not all(0 <= side < 2**40 for side in dims):
            raise _Damaged(f"a tensor is of type {kind} and shape {dims!r:.60}")
        needed = -(-math.prod(dims) * _BITS[kind] // 8)
        if location == _EXTERNAL or external:
            held = self.external(external)
        # numbers of few bits are kept as varints, of which each takes at least a byte
        if needed and held < (needed if location == _EXTERNAL else min(needed, math.prod(dims))):
            raise _Damaged(f"a tensor of {needed} bytes has {held}")

    def external(self, entries: dict[str, str]) -> int:
        """Return how many bytes of a tensor lie in the file beside; refuse any place but a plain file there."""
        name = entries.get("location", "")
        plain = PurePosixPath(name).name == name == PureWindowsPath(name).name and name not in ("", ".", "..")
        if not plain or len(name) > _LONGEST_NAME or "\0" in name:
            raise _Damaged(f"it names data at {name!r:.60}, outside its folder")
        data = self.path.parent / name
        if data.is_symlink() or not data.is_file():
            raise _Damaged(f"its data, the file {name!r:.60} beside it, is missing or no plain file")
        offset, length = int(entries.get("offset", "0")), int(entries.get("length", "0"))
        if offset < 0 or length < 0 or offset + length > data.stat().st_size:
            raise _Damaged(f"its data, the file {name!r:.60}, is cut off")
        self.beside.add(name)
        return length

    def fields(self, view: memoryview) -> Iterator[Field]:
        """Yield the fields of a message."""
        position, end = 0, len(view)
        while position < end:
            self.left -= 1
            if self.left < 0:
                raise _Damaged(f"it has more than {_MOST_FIELDS} fields")
            tag, position = _varint(view, position)
            number, wire = tag >> 3, tag & 7
            if wire == _VARINT:
                value, position = _varint(view, position)
                yield number, value
                continue
            if wire == _LENGTH_DELIMITED:
                length, position = _varint(view, position)
            elif wire in (1, 5):
                length = 8 if wire == 1 else 4
            else:
                raise _Damaged("it is no protobuf message")
            if position + length > end:
                raise _Damaged("it is cut off")
            yield number, view[position : position + length]
            position += length

    def text(self, view: memoryview, wanted: int) -> str:
        """Return the text of a field, of several the last; empty where there is none."""
        values = [_message(value) for number, value in self.fields(view) if number == wanted]
        return _decoded(values[-1]) if values else ""


def _refuse_set(domain: str) -> None:
    if domain not in STANDARD:
        raise _Damaged(f"it names operators of {domain!r:.60}, which are no standard ones")


def _varint(view: memoryview, position: int) -> tuple[int, int]:
    result = 0
    for shift in range(0, 70, 7):
        if position >= len(view):
            raise _Damaged("it is cut off")
        byte = view[position]
        position += 1
        result |= (byte & 127) << shift
        if byte < 128:
            return result, position
    raise _Damaged("it is no protobuf message")


def _packed(view: memoryview) -> list[int]:
    numbers, position = [], 0
    while position < len(view):
        number, position = _varint(view, position)
        numbers.append(number)
        if len(numbers) > _MOST_AXES:
            raise _Damaged(f"a tensor has more than {_MOST_AXES} axes")
    return numbers


def _message(value: int | memoryview) -> memoryview:
    if not isinstance(value, memoryview):
        raise _Damaged("it is no ONNX model")
    return value


def _number(value: int | memoryview) -> int:
    if not isinstance(value, int):
        raise _Damaged("it is no ONNX model")
    return value


def _decoded(view: memoryview) -> str:
    if len(view) > _LONGEST_TEXT:
        raise _Damaged(f"a text in it has {len(view)} bytes")
    return str(view, "utf-8")
