"""Strict reader of the protobuf messages of an ONNX file: it accepts only what has a single reading.

Protobuf parsers skip unknown fields, truncate long numbers to the bits of their type and merge repeated messages.
A check that reads a file differently from the runtime can be bypassed, so all of this is refused.
"""

import struct
from typing import Any, NamedTuple

VARINT, FIXED64, DELIMITED, FIXED32 = 0, 1, 2, 5  # wire types
_MOST_FIELDS, _LONGEST_TEXT = 2**22, 2**23  # over all messages of a file; bytes


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


class WireReader:
    """Reader of the messages of one file, limited in the number of fields of all messages: each field costs time."""

    def __init__(self) -> None:
        self._left = _MOST_FIELDS

    def message(self, view: memoryview, kind: str) -> dict[str, list[Any]]:
        """Return the fields of a message by name, in the file's order; nested messages stay bytes.

        Args:
            view: the bytes of the message.
            kind: its name in `SCHEMA`.

        Raises:
            Damaged: if the message is truncated or invalid, or parsers might read it in more than one way.
        """
        fields: dict[str, list[Any]] = {}
        schema, position = SCHEMA[kind], 0
        while position < len(view):
            self._count()
            tag, position = _varint(view, position)
            field, wire = schema.get(tag >> 3), tag & 7
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
                values = self._packed(value, field) if wanted != DELIMITED else [_delimited(value, field.kind)]
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

    def _packed(self, view: memoryview, field: Field) -> list[Any]:
        """Return the numbers of a packed repeated field."""
        if (wire := _WIRE[field.kind]) in _FIXED:
            form, size = _FIXED[wire]
            if len(view) % size:
                raise Damaged("it is truncated")
            self._count(len(view) // size)
            return [value for (value,) in struct.iter_unpack(form, view)]
        values, position = [], 0
        while position < len(view):
            self._count()
            value, position = _number(view, position, field.kind)
            values.append(value)
        return values

    def _count(self, fields: int = 1) -> None:
        self._left -= fields
        if self._left < 0:
            raise Damaged(f"it has more than {_MOST_FIELDS} fields")


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


def _delimited(view: memoryview, kind: str) -> Any:
    if kind != "text":
        return view
    if len(view) > _LONGEST_TEXT:
        raise Damaged(f"a text in it has {len(view)} bytes")
    return str(view, "utf-8")
