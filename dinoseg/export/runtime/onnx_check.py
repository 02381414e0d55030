"""Validation of ONNX files before any runtime loads them: only tensors and standard operators are accepted.

Messages are read here, so that inference needs no generated protobuf code of another package.
"""

import math
import mmap
import os
import struct
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

from dinoseg.utils.errors import UserError

STANDARD = ("", "ai.onnx")  # domains of ONNX's own operators
LARGEST_FILE = 2**31 - 1  # limit of a protobuf message
_MAX_NODES, _MAX_SIDE, _LONGEST_NAME, _MAX_AXES = 200_000, 2**20, 255, 64
_BITS = {1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 16: 16, 21: 4, 22: 4}
_DATA = ("raw_data", "float_data", "int32_data", "int64_data", "double_data", "uint64_data")
_EXTERNAL = 1  # value of data_location
_EXTERNAL_KEYS = ("location", "offset", "length", "checksum")


VARINT, FIXED64, DELIMITED, FIXED32 = 0, 1, 2, 5  # wire types
_MAX_FIELDS, _LONGEST_TEXT = 2**22, 2**23  # over all messages of a file; bytes
_CODE = "custom functions or training code"
_LOOPS = "graphs inside graphs, which may loop forever"
_SPARSE = "sparse tensors"
_REFUSED = {
    ("ModelProto", 20): _CODE,
    ("ModelProto", 25): _CODE,
    ("GraphProto", 15): _SPARSE,
    ("AttributeProto", 6): _LOOPS,
    ("AttributeProto", 11): _LOOPS,
    ("AttributeProto", 22): _SPARSE,
    ("AttributeProto", 23): _SPARSE,
    ("TensorProto", 6): "text",
}
_ENUMS = {"AttributeType": 15, "DataLocation": 2}  # number of valid values; parsers ignore others
_WIRE = {
    "float": FIXED32,
    "double": FIXED64,
    **dict.fromkeys(("int64", "uint64", "int32", *_ENUMS), VARINT),
}  # else DELIMITED
_FIXED = {FIXED32: ("<f", 4), FIXED64: ("<d", 8)}


def read_metadata(path: Path, key: str) -> str:
    """Return the text under `key` in a model's metadata, after validating the whole file.

    Raises:
        UserError: if the file cannot be read, is damaged or no ONNX file, or lacks this text; or if it refers to data
            outside its folder, non-standard operators, nested graphs or incomplete tensors.
    """
    return _read(path, key)[0]


def external_data(path: Path, key: str) -> list[str]:
    """Return the names of the files next to a model that hold its external tensors.

    Arguments and errors are those of `read_metadata`.
    """
    return sorted(_read(path, key)[1])


def _read(path: Path, key: str) -> tuple[str, set[str]]:
    try:
        size = os.path.getsize(path)
        if not path.is_file() or not 0 < size <= LARGEST_FILE:
            raise Damaged(f"a file of {size} bytes is not an ONNX model")
        with open(path, "rb") as file:
            reading = _Reading(path)
            text = reading.model(memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)), key)
            return text, reading.external_files
    except (ValueError, OverflowError) as error:
        raise UserError(f"{path}: not an ONNX file of dinoseg: {error}. Export the model again.") from None
    except OSError as error:
        raise UserError(
            f"Cannot read {path} ({error.strerror}). Check the path, its permissions and its disk."
        ) from error


class _Reading:
    """Validator of one file.

    Args:
        path: of the file; external data lies next to it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.reader = WireReader()
        self.external_files: set[str] = set()  # names of the files with external data

    def model(self, view: memoryview, key: str) -> str:
        """Validate a ModelProto and return the text under `key` in its metadata."""
        model = self.reader.message(view, "ModelProto")
        for entry in model.get("opset_import", ()):
            _refuse_set(self.reader.message(entry, "OperatorSetIdProto"))
        if len(model.get("graph", ())) != 1:
            raise Damaged("it holds no graph")
        self.graph(model["graph"][0])
        found = [text for name, text in self.entries(model.get("metadata_props", [])) if name == key]
        if len(found) != 1:
            raise Damaged("it was not written by dinoseg (mode=export export=onnx)")
        return found[0]

    def graph(self, view: memoryview) -> None:
        """Validate a GraphProto."""
        graph = self.reader.message(view, "GraphProto")
        if len(graph.get("node", ())) > _MAX_NODES:
            raise Damaged(f"it has more than {_MAX_NODES} nodes")
        for node in graph.get("node", ()):
            self.node(node)
        for tensor in graph.get("initializer", ()):
            self.tensor(tensor)
        for name in ("input", "output", "value_info"):
            for value in graph.get(name, ()):
                self.value(value, name)
        self.entries(graph.get("metadata_props", []))

    def node(self, view: memoryview) -> None:
        """Validate a NodeProto and its attributes."""
        node = self.reader.message(view, "NodeProto")
        _refuse_set(node)
        for value in node.get("attribute", ()):
            for tensor in self.reader.message(value, "AttributeProto").get("t", ()):
                self.tensor(tensor)
        self.entries(node.get("metadata_props", []))

    def value(self, view: memoryview, name: str) -> None:
        """Validate the shape of an input, an output or an intermediate value (ValueInfoProto)."""
        value = self.reader.message(view, "ValueInfoProto")
        self.entries(value.get("metadata_props", []))
        levels = value.get("type", [])
        for kind, inner in (("TypeProto", "tensor_type"), ("TypeProto.Tensor", "shape"), ("TensorShapeProto", "dim")):
            levels = [found for level in levels for found in self.reader.message(level, kind).get(inner, ())]
        dims = [self.reader.message(level, "TensorShapeProto.Dimension") for level in levels]
        sides = [side for dim in dims for side in dim.get("dim_value", ())]
        if name == "input" and not all(0 <= side <= _MAX_SIDE for side in sides):
            raise Damaged("an input has an invalid image size")

    def tensor(self, view: memoryview) -> None:
        """Validate a TensorProto: all of its numbers must be present."""
        tensor = self.reader.message(view, "TensorProto")
        self.entries(tensor.get("metadata_props", []))
        dims, (kind,) = tensor.get("dims", []), tensor.get("data_type", [0])
        if kind not in _BITS or len(dims) > _MAX_AXES or not all(0 <= side < 2**40 for side in dims):
            raise Damaged(f"a tensor is of type {kind} and shape {dims!r:.60}")
        held = {name: tensor[name] for name in _DATA if name in tensor}
        is_external = "external_data" in tensor or tensor.get("data_location") == [_EXTERNAL]
        if len(held) + is_external > 1:
            raise Damaged(f"a tensor has its values in two places: {', '.join(held)}")
        count = math.prod(dims)
        needed = -(-count * _BITS[kind] // 8)  # bytes
        if is_external:
            found = self.external(self.entries(tensor.get("external_data", [])))
        elif "raw_data" in held:
            found = len(held["raw_data"][0])
        else:  # types below 32 bits use one entry per number, 4-bit types half of one
            per_number = 2 if _BITS[kind] < 8 else 1
            found = needed if per_number * sum(map(len, held.values())) >= count else 0
        if found < needed:
            raise Damaged(f"a tensor of {needed} bytes has {found}")

    def external(self, pairs: list[tuple[str, str]]) -> int:
        """Return the number of bytes of a tensor in external data; refuse all but a plain file next to the model."""
        entries = dict(pairs)
        wrong = next((name for name in entries if name not in _EXTERNAL_KEYS), None)
        if wrong is not None or len(entries) != len(pairs):
            raise Damaged(f"it describes its data by {wrong or pairs!r:.60}, which is unknown or duplicated")
        name = entries.get("location", "")
        plain = PurePosixPath(name).name == name == PureWindowsPath(name).name and name not in ("", ".", "..")
        if not plain or len(name) > _LONGEST_NAME or "\0" in name:
            raise Damaged(f"it names data at {name!r:.60}, outside its folder")
        data = self.path.parent / name
        if data.is_symlink() or not data.is_file():
            raise Damaged(f"its data, the file {name!r:.60} in the same folder, is missing or not a regular file")
        offset, length = (_whole_number(entries.get(key, "0")) for key in ("offset", "length"))
        if offset + length > data.stat().st_size:
            raise Damaged(f"its data, the file {name!r:.60}, is truncated")
        self.external_files.add(name)
        return length

    def entries(self, views: list[memoryview]) -> list[tuple[str, str]]:
        """Return the keys and values of metadata (StringStringEntryProto)."""
        read = [self.reader.message(view, "StringStringEntryProto") for view in views]
        return [(entry.get("key", [""])[0], entry.get("value", [""])[0]) for entry in read]


def _refuse_set(message: dict[str, list[Any]]) -> None:
    (domain,) = message.get("domain", [""])
    if domain not in STANDARD:
        raise Damaged(f"it uses operators of {domain!r:.60}, which are not standard")


def _whole_number(text: str) -> int:
    """Return a number of bytes, which must be plain digits: the runtime reads those in the same way."""
    if not (text.isascii() and text.isdigit() and len(text) < 16):
        raise Damaged(f"it describes its data by {text!r:.60}, which must be a number of bytes")
    return int(text)


class Damaged(ValueError):
    """Error for a file that is no ONNX model, or one that may not be run; the text gives the reason."""


class Field(NamedTuple):
    """A message field: its name in onnx.proto, the message or scalar type of its values, and whether it may repeat."""

    name: str
    kind: str
    repeated: bool = False


# by message and field number, as in onnx.proto: the fields of exported models and of plain tensors
SCHEMA: dict[str, dict[int, Field]] = {
    "ModelProto": {
        1: Field("ir_version", "int64"),
        2: Field("producer_name", "text"),
        3: Field("producer_version", "text"),
        4: Field("domain", "text"),
        5: Field("model_version", "int64"),
        6: Field("doc_string", "text"),
        7: Field("graph", "GraphProto"),
        8: Field("opset_import", "OperatorSetIdProto", True),
        14: Field("metadata_props", "StringStringEntryProto", True),
    },
    "OperatorSetIdProto": {1: Field("domain", "text"), 2: Field("version", "int64")},
    "StringStringEntryProto": {1: Field("key", "text"), 2: Field("value", "text")},
    "GraphProto": {
        1: Field("node", "NodeProto", True),
        2: Field("name", "text"),
        5: Field("initializer", "TensorProto", True),
        10: Field("doc_string", "text"),
        11: Field("input", "ValueInfoProto", True),
        12: Field("output", "ValueInfoProto", True),
        13: Field("value_info", "ValueInfoProto", True),
        16: Field("metadata_props", "StringStringEntryProto", True),
    },
    "NodeProto": {
        1: Field("input", "text", True),
        2: Field("output", "text", True),
        3: Field("name", "text"),
        4: Field("op_type", "text"),
        5: Field("attribute", "AttributeProto", True),
        6: Field("doc_string", "text"),
        7: Field("domain", "text"),
        9: Field("metadata_props", "StringStringEntryProto", True),
    },
    "AttributeProto": {
        1: Field("name", "text"),
        2: Field("f", "float"),
        3: Field("i", "int64"),
        4: Field("s", "bytes"),
        5: Field("t", "TensorProto"),
        7: Field("floats", "float", True),
        8: Field("ints", "int64", True),
        9: Field("strings", "bytes", True),
        13: Field("doc_string", "text"),
        20: Field("type", "AttributeType"),
    },
    "TensorProto": {
        1: Field("dims", "int64", True),
        2: Field("data_type", "int32"),
        4: Field("float_data", "float", True),
        5: Field("int32_data", "int32", True),
        7: Field("int64_data", "int64", True),
        8: Field("name", "text"),
        9: Field("raw_data", "bytes"),
        10: Field("double_data", "double", True),
        11: Field("uint64_data", "uint64", True),
        12: Field("doc_string", "text"),
        13: Field("external_data", "StringStringEntryProto", True),
        14: Field("data_location", "DataLocation"),
        16: Field("metadata_props", "StringStringEntryProto", True),
    },
    "ValueInfoProto": {
        1: Field("name", "text"),
        2: Field("type", "TypeProto"),
        3: Field("doc_string", "text"),
        4: Field("metadata_props", "StringStringEntryProto", True),
    },
    "TypeProto": {1: Field("tensor_type", "TypeProto.Tensor"), 6: Field("denotation", "text")},
    "TypeProto.Tensor": {1: Field("elem_type", "int32"), 2: Field("shape", "TensorShapeProto")},
    "TensorShapeProto": {1: Field("dim", "TensorShapeProto.Dimension", True)},
    "TensorShapeProto.Dimension": {
        1: Field("dim_value", "int64"),
        2: Field("dim_param", "text"),
        3: Field("denotation", "text"),
    },
}


class WireReader:
    """Reader of the messages of one file, limited in the number of fields of all messages: each field costs time."""

    def __init__(self) -> None:
        self._left = _MAX_FIELDS

    def message(self, view: memoryview, kind: str) -> dict[str, list[Any]]:
        """Return the fields of a message by name, in the file's order; nested messages stay bytes.

        Args:
            view: the bytes of the message.
            kind: its name in `SCHEMA`.

        Raises:
            Damaged: if the message is truncated or invalid, or parsers might read it in more than one way.
        """
        fields: dict[str, list[Any]] = {}
        schema = SCHEMA[kind]
        position = 0
        while position < len(view):
            self._count()
            tag, position = _varint(view, position)
            field = schema.get(tag >> 3)
            wire = tag & 7
            if field is None:
                what = _REFUSED.get((kind, tag >> 3), f"field {tag >> 3} of {kind}, which dinoseg never writes")
                raise Damaged(f"it holds {what}")
            wanted = _WIRE.get(field.kind, DELIMITED)
            if wire == DELIMITED and (wanted == DELIMITED or field.repeated):
                length, position = _varint(view, position)
                if length > len(view) - position:
                    raise Damaged("it is truncated")
                value = view[position : position + length]
                position += length
                if wanted == DELIMITED:
                    values = [_read_delimited(value, field.kind)]
                else:
                    values = self._read_packed(value, field)
            elif wire == wanted:
                value, position = _number(view, position, field.kind)
                values = [value]
            else:
                raise Damaged(f"{field.name} of {kind} has the wire type {wire} instead of {wanted}")
            known = fields.setdefault(field.name, [])
            known += values
            if not field.repeated and len(known) > 1:
                raise Damaged(f"{field.name} of {kind} occurs more than once")
        if {"dim_value", "dim_param"} <= fields.keys():
            raise Damaged("a size is a number and a name at once")
        return fields

    def _read_packed(self, view: memoryview, field: Field) -> list[Any]:
        """Return the numbers of a packed repeated field."""
        if (wire := _WIRE[field.kind]) in _FIXED:
            form, size = _FIXED[wire]
            if len(view) % size:
                raise Damaged("it is truncated")
            self._count(len(view) // size)
            return [value for (value,) in struct.iter_unpack(form, view)]
        values = []
        position = 0
        while position < len(view):
            self._count()
            value, position = _number(view, position, field.kind)
            values.append(value)
        return values

    def _count(self, fields: int = 1) -> None:
        self._left -= fields
        if self._left < 0:
            raise Damaged(f"it has more than {_MAX_FIELDS} fields")


def _number(view: memoryview, position: int, kind: str) -> tuple[Any, int]:
    """Return the number that begins at a position, and the position after it."""
    if (wire := _WIRE[kind]) in _FIXED:
        form, size = _FIXED[wire]
        if size > len(view) - position:
            raise Damaged("it is truncated")
        return struct.unpack_from(form, view, position)[0], position + size
    value, position = _varint(view, position)
    if kind != "uint64" and value >= 2**63:
        value -= 2**64
    if kind == "int32" and not -(2**31) <= value < 2**31:
        raise Damaged(f"the number {value} exceeds 32 bits")
    if kind in _ENUMS and not 0 <= value < _ENUMS[kind]:
        raise Damaged(f"{value} is not a {kind}")
    return value, position


def _varint(view: memoryview, position: int) -> tuple[int, int]:
    """Return the number of at most 64 bits that begins at a position, and the position after it.

    Only its shortest encoding is accepted.
    """
    result = 0
    for shift in range(0, 70, 7):
        if position >= len(view):
            raise Damaged("it is truncated")
        byte = view[position]
        position += 1
        result |= (byte & 127) << shift
        if byte < 128:
            if result >= 2**64 or (byte == 0 and shift):
                break
            return result, position
    raise Damaged("it is not a protobuf message: a number has more than 64 bits, or too long an encoding")


def _read_delimited(view: memoryview, kind: str) -> Any:
    if kind != "text":
        return view
    if len(view) > _LONGEST_TEXT:
        raise Damaged(f"a text in it has {len(view)} bytes")
    return str(view, "utf-8")
