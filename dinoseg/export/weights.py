"""Weights of an ONNX file in fewer bits: held as float16 or int8, and taken to float32 where they are used."""

import numpy as np
import onnx
from onnx import helper, numpy_helper

LEAST = 1024  # numbers of a tensor that is worth it
# operator to the input that is its weight, and the axis of its output channels
_WEIGHTS = {"Conv": (1, 0), "ConvTranspose": (1, 1), "Gemm": (1, None), "MatMul": (1, 1), "Transpose": (0, 0)}


def shorten(model: onnx.ModelProto, precision: str) -> None:
    """Hold the weights of convolutions and matrix products in fewer bits, in place.

    Args:
        model: its weights are float32.
        precision: float16; or int8: a scale for each output channel, its largest weight 127 steps.
    """
    graph = model.graph
    axes = _axes(graph)
    added = []
    for number, tensor in enumerate(graph.initializer):
        if tensor.name in axes and tensor.data_type == onnx.TensorProto.FLOAT:
            weights = numpy_helper.to_array(tensor)
            if weights.size >= LEAST:
                stored, nodes = (_half if precision == "float16" else _steps)(tensor.name, weights, axes[tensor.name])
                graph.initializer[number].CopyFrom(stored[0])
                graph.initializer.extend(stored[1:])
                added += nodes
    nodes = [*added, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


def _axes(graph: onnx.GraphProto) -> dict[str, int]:
    """Return the weights' names, each with the axis of its output channels."""
    axes = {}
    for node in graph.node:
        place, axis = _WEIGHTS.get(node.op_type, (0, -1))
        if axis == -1 or len(node.input) <= place:
            continue
        if axis is None:
            axis = 0 if any(entry.name == "transB" and entry.i for entry in node.attribute) else 1
        axes[node.input[place]] = axis
    return axes


def _half(name: str, weights: np.ndarray, axis: int) -> tuple[list[onnx.TensorProto], list[onnx.NodeProto]]:
    limit = np.finfo(np.float16).max
    stored = numpy_helper.from_array(weights.clip(-limit, limit).astype(np.float16), f"{name}.float16")
    return [stored], [helper.make_node("Cast", [stored.name], [name], to=onnx.TensorProto.FLOAT)]


def _steps(name: str, weights: np.ndarray, axis: int) -> tuple[list[onnx.TensorProto], list[onnx.NodeProto]]:
    others = tuple(other for other in range(weights.ndim) if other != axis)
    largest = np.abs(weights).max(axis=others, keepdims=True)
    scale = np.where(largest > 0, largest / 127, 1).astype(np.float32)
    steps = np.round(weights / scale).clip(-127, 127).astype(np.int8)
    stored = numpy_helper.from_array(steps, f"{name}.int8")
    scales = numpy_helper.from_array(scale.reshape(-1), f"{name}.scale")
    node = helper.make_node("DequantizeLinear", [stored.name, scales.name], [name], axis=axis)
    return [stored, scales], [node]
