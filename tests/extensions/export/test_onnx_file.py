"""What is done to an ONNX model after torch made it: weights shortened by channel, notes of this machine taken away."""

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from dinoseg.extensions.export import onnx_file
from dinoseg.extensions.export.onnx_file import MIN, shorten
from dinoseg.extensions.export.onnx_model import open_session
from dinoseg.extensions.export.onnx_record import KEY, GraphRecord

RECORD = GraphRecord(8, 1.0, None, None, None, None, None, (0.5, 0.5, 0.5), "scores", False, False, 18, "float32")
LABELS = {"classes": ["a", "b"], "palette": [[0, 0, 0], [1, 1, 1]], "ignore_index": 255}

# operator to the shape of its weight, the axis of output channels, the shape of its input, and its attributes
OPERATORS = {
    "Conv": ((8, 16, 3, 3), 0, (1, 16, 5, 5), {}),
    "ConvTranspose": ((16, 8, 3, 3), 1, (1, 16, 5, 5), {}),
    "Gemm": ((32, 40), 1, (5, 32), {}),
    "Gemm, transposed": ((40, 32), 0, (5, 32), {"transB": 1}),
    "MatMul": ((32, 40), 1, (2, 5, 32), {}),
}


def one_operator(name):
    """Return a model of one operator whose output channels have weights of very different sizes, and an input."""
    shape, axis, given, attributes = OPERATORS[name]
    draw = np.random.default_rng(0)
    channel = np.logspace(-3, 3, shape[axis]).reshape([-1 if side == axis else 1 for side in range(len(shape))])
    weights = (draw.normal(size=shape) * channel).astype(np.float32)
    node = helper.make_node(name.split(",")[0], ["x", "w"], ["y"], **attributes)
    graph = helper.make_graph(
        [node],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, given)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(weights, "w"), numpy_helper.from_array(np.ones(MIN, np.float32), "free")],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return made, draw.normal(size=given).astype(np.float32)


def run_onnx(made, given):
    with tempfile.NamedTemporaryFile(suffix=".onnx") as file:
        file.write(made.SerializeToString())
        file.flush()
        return open_session(Path(file.name), device="cpu").run(None, {"x": given})[0]


def read_description(path):
    return json.loads(open_session(path, device="cpu").get_modelmeta().custom_metadata_map[KEY])


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize(("precision", "near", "kind"), [("float16", 1e-3, 10), ("int8", 0.05, 3)])
def test_each_channel_keeps_its_own_scale(name, precision, near, kind):
    made, given = one_operator(name)
    wanted = run_onnx(made, given)
    shorten(made, precision)
    axis = tuple(side for side in range(wanted.ndim) if side != (1 if "Conv" in name else wanted.ndim - 1))
    error = np.abs(run_onnx(made, given) - wanted).max(axis=axis) / np.abs(wanted).max(axis=axis)
    assert error.max() < near
    kinds = {entry.name: entry.data_type for entry in made.graph.initializer}
    assert kinds[f"w.{precision}"] == kind and "w" not in kinds and kinds["free"] == TensorProto.FLOAT


def test_products_with_int8_weights_are_computed_in_float32():
    made, given = one_operator("MatMul")
    weights = numpy_helper.to_array(made.graph.initializer[0])
    scale = np.abs(weights).max(axis=0) / 127
    shorten(made, "int8")
    wanted = given.astype(np.float64) @ (np.round(weights / scale) * scale)
    assert (np.abs(run_onnx(made, given) - wanted) / np.abs(wanted).max(axis=(0, 1))).max() < 1e-5


def test_small_and_empty_channels_survive_short_precisions():
    made, given = one_operator("MatMul")
    weights = numpy_helper.to_array(made.graph.initializer[0]).copy()
    weights[:, 3] = 0
    weights[0, 5] = 1e30  # beyond float16
    made.graph.initializer[0].CopyFrom(numpy_helper.from_array(weights, "w"))
    for precision in ("float16", "int8"):
        short = onnx.ModelProto.FromString(made.SerializeToString())
        shorten(short, precision)
        found = run_onnx(short, given)
        assert np.isfinite(found).all() and (found[..., 3] == 0).all()
    made.graph.initializer[0].CopyFrom(numpy_helper.from_array(weights[:, : MIN // 32 - 1], "w"))
    shorten(made, "int8")
    assert [entry.name for entry in made.graph.initializer] == ["w", "free"]


def test_onnx_file_has_metadata_but_no_local_path(tmp_path, monkeypatch):
    made, _ = one_operator("MatMul")
    for part in (made, made.graph, *made.graph.node, *made.graph.initializer, *made.graph.input):
        part.doc_string = "/home/me/dinoseg/models/model.py:7"
        entry = part.metadata_props.add()
        entry.key, entry.value = "pkg.torch.onnx.stack_trace", "/home/me"
    record = replace(RECORD, precision="int8")
    onnx_file.finish(made, record, LABELS)
    (path,) = onnx_file.write(made, tmp_path / "model.onnx")
    assert b"/home/me" not in path.read_bytes() and b"w.int8" in path.read_bytes()
    assert read_description(path) == {"graph": {**record.plain(), "fill": [0.5] * 3}, **LABELS}
    assert made.ir_version == 8  # the least that its operators need, so that runtimes of 2022 take it
    monkeypatch.setattr(onnx_file, "LARGEST", 100)
    files = onnx_file.write(made, tmp_path / "large.onnx")
    assert [file.name for file in files] == ["model.onnx.data", "large.onnx"] and files[0].stat().st_size > MIN
    assert read_description(files[1])["graph"]["precision"] == "int8"


def test_full_precision_weights_are_unchanged():
    made, given = one_operator("Conv")
    wanted = run_onnx(made, given)
    onnx_file.finish(made, RECORD, LABELS)
    assert (run_onnx(made, given) == wanted).all()
    assert [entry.name for entry in made.graph.initializer] == ["w", "free"]
