"""ONNX files that parsers could read in two ways are refused, and what graphs compute is bounded in memory."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from google.protobuf.message import DecodeError
from google.protobuf.unknown_fields import UnknownFieldSet
from mistakes import assert_refused
from onnx import TensorProto, helper, numpy_helper
from test_onnx_files import model, write_model

import dinoseg
from dinoseg.export.runtime import onnx_model
from dinoseg.export.runtime.onnx_check import SCHEMA, Damaged, WireReader


def varint(number):
    """Return a number in the shortest form of protobuf's varints, of any number of bits."""
    groups = [number >> shift & 127 for shift in range(0, max(1, number.bit_length()), 7)]
    return bytes([group | 128 for group in groups[:-1]] + groups[-1:])


def delimited_field(tag, content):
    return varint(tag) + varint(len(content)) + content


LOOP = helper.make_node(
    "Loop", ["rounds", "", "image"], ["scores"], body=helper.make_graph([], "body", [], [])
).SerializeToString()
FOREIGN = helper.make_node("Gelu", ["image"], ["scores"], domain="com.microsoft").SerializeToString()
# fields whose tags parsers cut to 32 bits
HIDDEN = {
    "a graph with a loop": lambda: delimited_field(7 << 3 | 2 | 1 << 40, delimited_field(1 << 3 | 2, LOOP)),
    "foreign operators": lambda: delimited_field(7 << 3 | 2 | 1 << 32, delimited_field(1 << 3 | 2, FOREIGN)),
    "a function": lambda: delimited_field(25 << 3 | 2 | 1 << 35, onnx.FunctionProto(name="Mine").SerializeToString()),
    "a field of number 0": lambda: delimited_field(2, b"1"),
    "an unknown field": lambda: delimited_field(99 << 3 | 2, b"1"),
    "a second graph": lambda: delimited_field(7 << 3 | 2, delimited_field(1 << 3 | 2, FOREIGN)),
    "a version of 70 bits": lambda: varint(1 << 3) + varint(1 << 69 | 10),
    "a group": lambda: varint(7 << 3 | 3) + delimited_field(1 << 3 | 2, LOOP) + varint(7 << 3 | 4),
    "a tag longer than it has to be": lambda: b"\xba\x80\x80\x80\x00" + delimited_field(0, b"")[1:],
}


@pytest.mark.parametrize("what", HIDDEN)
def test_fields_that_parsers_may_read_otherwise_are_refused(tmp_path, monkeypatch, what):
    monkeypatch.setattr("dinoseg.export.runtime.onnx_model.open_session", lambda *_, **__: pytest.fail("it was opened"))
    path = write_model(tmp_path, model())
    path.write_bytes(path.read_bytes() + HIDDEN[what]())
    assert_refused(lambda: dinoseg.load(path), "not an ONNX file of dinoseg")


def tree(view, kind, reader):
    """Return all that the strict reader finds in a message."""
    found = {}
    for name, values in reader.message(view, kind).items():
        field = next(field for field in SCHEMA[kind].values() if field.name == name)
        inner = [tree(value, field.kind, reader) if field.kind in SCHEMA else value for value in values]
        inner = [bytes(value) if isinstance(value, memoryview) else value for value in inner]
        if inner:  # a packed field may hold nothing
            found[name] = inner if field.repeated else inner[0]
    return found


def plain_fields(message):
    """Return all that protobuf finds in a message, which has to know each field."""
    assert not len(UnknownFieldSet(message))
    found = {}
    for field, value in message.ListFields():
        plain = (lambda each: plain_fields(each)) if field.type == field.TYPE_MESSAGE else (lambda each: each)
        found[field.name] = [plain(each) for each in value] if field.is_repeated else plain(value)
    return found


def same(left, right):
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right or (left != left and right != right)


def rich():
    """Return a model that has every field that may be there."""
    made = model(initializers=[helper.make_tensor("a", TensorProto.DOUBLE, [1], [0.5])])
    tensors = [
        helper.make_tensor("i", TensorProto.INT32, [2], [-1, 2**31 - 1]),
        helper.make_tensor("l", TensorProto.INT64, [2], [-(2**63), 3]),
        helper.make_tensor("u", TensorProto.UINT64, [1], [2**64 - 1]),
        helper.make_tensor("f", TensorProto.FLOAT, [2], [1.5, float("nan")]),
    ]
    for number, tensor in enumerate(tensors):
        made.graph.node.append(helper.make_node("Constant", [], [f"c{number}"], value=tensor))
    made.graph.node.append(helper.make_node("Fit", ["a"], ["b"], i=-3, f=0.1, s="x", floats=[1.0], ints=[-1, 9]))
    made.graph.node[-1].attribute.append(helper.make_attribute("texts", ["p", "q"]))
    made.graph.value_info.append(helper.make_tensor_value_info("b", TensorProto.FLOAT, [1, "n"]))
    return made.SerializeToString()


def test_accepted_bytes_are_parsed_as_protobuf_does():
    whole, rng, accepted = rich(), np.random.default_rng(0), 0
    assert same(tree(memoryview(whole), "ModelProto", WireReader()), plain_fields(onnx.ModelProto.FromString(whole)))
    pieces = [varint(1 << bits | tag) for bits in (0, 31, 32, 35, 63, 64, 69) for tag in (2, 8, 10, 58, 0x7FFFFFFF)]
    for _ in range(2000):
        changed = bytearray(whole)
        for _ in range(rng.integers(1, 4)):
            at = int(rng.integers(len(changed)))
            piece = pieces[rng.integers(len(pieces))] if rng.random() < 0.3 else rng.bytes(int(rng.integers(1, 4)))
            changed[at : at + int(rng.integers(0, 3))] = piece[: int(rng.integers(1, len(piece) + 1))]
        try:
            found = tree(memoryview(bytes(changed)), "ModelProto", WireReader())
        except (Damaged, UnicodeDecodeError):
            continue
        accepted += 1
        try:
            known = plain_fields(onnx.ModelProto.FromString(bytes(changed)))
        except DecodeError:  # then no runtime runs it
            continue
        assert same(found, known), bytes(changed)
    assert accepted > 50


@pytest.mark.parametrize(("number", "size"), [(4, 4), (10, 8)])
def test_packed_numbers_are_bounded(monkeypatch, number, size):
    monkeypatch.setattr("dinoseg.export.runtime.onnx_check._MAX_FIELDS", 50)
    packed = memoryview(delimited_field(number << 3 | 2, bytes(size * 50)))
    with pytest.raises(Damaged, match="more than 50 fields"):
        WireReader().message(packed, "TensorProto")


def test_existing_onnxruntime_allocator_is_left_alone(monkeypatch):
    monkeypatch.setattr("onnxruntime.create_and_register_allocator", lambda *_: 1 / 0)
    onnx_model._bound_memory.__wrapped__()


GROWING = """if True:
    import sys
    from pathlib import Path
    import numpy as np
    import dinoseg.export.runtime.onnx_model as onnx_model
    onnx_model.machine_memory = lambda: 2.0**28
    session = onnx_model.open_session(Path(sys.argv[1]), device="cpu")
    try:
        session.run(None, {"image": np.zeros((1, 3, 8, 8), np.float32)})
    except Exception as error:
        print("refused" if "smaller than requested" in str(error) else error)
"""


@pytest.mark.parametrize("operator", ["ConstantOfShape", "Tile", "Concat"])
def test_memory_of_a_graph_is_bounded(tmp_path, operator):
    sizes = numpy_helper.from_array(np.int64([2**28]), "sizes")
    times = numpy_helper.from_array(np.int64([1, 1, 2**10, 2**8]), "times")
    concat = [
        helper.make_node(
            "Concat", [f"x{step}" if step else "image"] * 4, [f"x{step + 1}" if step < 9 else "big"], axis=0
        )
        for step in range(10)
    ]
    nodes = {
        "ConstantOfShape": [helper.make_node("ConstantOfShape", ["sizes"], ["big"])],
        "Tile": [helper.make_node("Tile", ["image", "times"], ["big"])],
        "Concat": concat,
    }[operator]
    nodes.append(helper.make_node("ReduceMax", ["big"], ["most"], keepdims=0))
    nodes.append(helper.make_node("Add", ["image", "most"], ["scores"]))
    path = write_model(tmp_path, model(nodes=nodes, initializers=[sizes, times]))
    where = {**os.environ, "PYTHONPATH": str(Path(dinoseg.__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", GROWING, path], env=where, capture_output=True, text=True)
    assert done.stdout == "refused\n", done.stdout + done.stderr
