"""ONNX files of traced models: conversion, weight compression and metadata."""

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper

from dinoseg.extensions.export.graph import cannot
from dinoseg.extensions.export.onnx_model import ONNX_WEIGHTS
from dinoseg.extensions.export.onnx_record import KEY, OUTPUTS, GraphRecord
from dinoseg.utils.errors import UserError

LARGEST = 2**31 - 2**20  # bytes in one protobuf message; larger models store their weights in a second file


def to_onnx(program: torch.export.ExportedProgram, record: GraphRecord) -> onnx.ModelProto:
    """Convert a traced model to an ONNX model.

    Raises:
        UserError: if torch cannot convert it; the message gives the reason.
    """
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # the exporter prints its steps
            warnings.simplefilter("ignore")
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            exported = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=record.opset,
                input_names=["image"],
                output_names=list(OUTPUTS[record.kind]),
                verbose=False,
            )
        if exported is None:
            raise UserError("torch.onnx.export returned nothing. Install the newest onnxscript.")
        return exported.model_proto
    except Exception as error:  # unsupported operators raise many exception types
        raise UserError(cannot(error, record)) from error
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def finish(model: onnx.ModelProto, record: GraphRecord, description: Mapping[str, Any]) -> None:
    """Compress the weights, strip metadata about this machine and add the description, all in place."""
    if record.precision != "float32":
        shorten(model, record.precision)
    strip(model)
    # torch sets a newer IR version than the operators need, which older runtimes reject
    model.ir_version = onnx.helper.find_min_ir_version_for(list(model.opset_import))
    del model.metadata_props[:]
    entry = model.metadata_props.add()
    entry.key, entry.value = KEY, json.dumps({"graph": record.plain(), **description}, allow_nan=False)


def strip(model: onnx.ModelProto) -> None:
    """Remove the metadata of nodes and values: torch's notes hold paths and source lines of this machine."""
    graph = model.graph
    for part in (model, graph, *graph.node, *graph.input, *graph.output, *graph.initializer, *graph.value_info):
        part.ClearField("doc_string")
        part.ClearField("metadata_props")


def write(model: onnx.ModelProto, path: Path) -> list[Path]:
    """Write a model, and its weights to a second file where it is too large; return the paths, the model's last."""
    if model.ByteSize() < LARGEST:
        path.write_bytes(model.SerializeToString())
        return [path]
    data = path.with_name(ONNX_WEIGHTS)
    onnx.save_model(model, path, save_as_external_data=True, all_tensors_to_one_file=True, location=data.name)
    return [data, path]


def check_opset(opset: int) -> None:
    """Refuse an ONNX opset that cannot be written.

    Raises:
        UserError: if `opset` is outside the supported range, which the message gives.
    """
    newest = onnx.defs.onnx_opset_version()
    if not 18 <= opset <= newest:
        raise UserError(
            f"export.opset={opset}: give 18 (torch's first) to {newest} (the newest of onnx {onnx.__version__})."
        )


MIN = 1024  # smallest number of weights that is worth compressing
# operator: (index of its weight input, axis of the output channels; None: depends on transB)
_WEIGHTS = {"Conv": (1, 0), "ConvTranspose": (1, 1), "Gemm": (1, None), "MatMul": (1, 1), "Transpose": (0, 0)}


def shorten(model: onnx.ModelProto, precision: str) -> None:
    """Store the weights of convolutions and matrix products in fewer bits, in place.

    Args:
        model: its weights are float32.
        precision: float16; or int8 with one scale per output channel, whose largest weight is 127 steps.
    """
    graph = model.graph
    axes = _axes(graph)
    added = []
    for number, tensor in enumerate(graph.initializer):
        if tensor.name in axes and tensor.data_type == onnx.TensorProto.FLOAT:
            weights = numpy_helper.to_array(tensor)
            if weights.size >= MIN:
                stored, nodes = (_half if precision == "float16" else _steps)(tensor.name, weights, axes[tensor.name])
                graph.initializer[number].CopyFrom(stored[0])
                graph.initializer.extend(stored[1:])
                added += nodes
    nodes = [*added, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


def _axes(graph: onnx.GraphProto) -> dict[str, int]:
    """Map the names of weights to the axis of their output channels."""
    axes = {}
    for node in graph.node:
        index, axis = _WEIGHTS.get(node.op_type, (0, -1))
        if axis == -1 or len(node.input) <= index:
            continue
        if axis is None:
            axis = 0 if any(entry.name == "transB" and entry.i for entry in node.attribute) else 1
        axes[node.input[index]] = axis
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
