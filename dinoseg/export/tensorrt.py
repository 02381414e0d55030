"""TensorRT engines of ONNX files, built by trtexec or by the Python package `tensorrt` (10 or newer)."""

import importlib
import shutil
import subprocess
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dinoseg.core.sizes import Size
from dinoseg.export.runtime.onnx_record import GraphRecord
from dinoseg.utils.atomic import whole_file
from dinoseg.utils.errors import UserError

SUFFIX = ".engine"
_LEAST, _MOST, _BATCH = 16, 64, 8  # patch rows and columns that a dynamic engine always supports; largest batch
_ONNX_SAVED = "The ONNX file is verified and saved. See the output of TensorRT above; another export.opset may help."
Shape = tuple[int, int, int, int]  # (B, 3, H, W)


def check_tensorrt() -> None:
    """Refuse to build an engine where TensorRT is not installed.

    Raises:
        UserError: if both trtexec and the Python package are missing.
    """
    if shutil.which("trtexec") is None and find_spec("tensorrt") is None:
        raise UserError(
            "export.tensorrt=true: neither trtexec nor the Python package tensorrt is installed. Install TensorRT on "
            "the machine with the GPU that the engine is for, or build it there from model.onnx."
        )


def build_engine(path: Path, record: GraphRecord, sizes: Sequence[Size]) -> Path:
    """Build the engine of a verified ONNX file next to it, and return its path.

    The engine itself is not verified.

    Args:
        path: the ONNX file.
        record: of its graph.
        sizes: (H, W) of images at the graph's input; a dynamic engine supports these and sizes between them.

    Raises:
        UserError: if TensorRT is missing or fails; the message quotes its reason.
    """
    check_tensorrt()
    engine_path = path.with_suffix(SUFFIX)
    with whole_file(engine_path) as part:
        build = _by_command if shutil.which("trtexec") is not None else _by_package
        build(path, part, shapes(record, sizes))
    print(
        f"written to {engine_path}: {engine_path.stat().st_size / 1e6:.2f} MB, for this GPU and TensorRT "
        "version only; not verified"
    )
    return engine_path


def shapes(record: GraphRecord, sizes: Sequence[Size]) -> list[Shape]:
    """Return the smallest, most common and largest input shape of an engine; a single one for a fixed-size graph."""
    if record.size is not None:
        return [(record.batch or 1, 3, *record.size)]
    least = min(_LEAST * record.multiple, *(min(size) for size in sizes))
    most = max(_MOST * record.multiple, *(max(size) for size in sizes))
    return [(1, 3, least, least), (1, 3, *sizes[0]), (_BATCH, 3, most, most)]


def _by_command(path: Path, part: Path, profile: Sequence[Shape]) -> None:
    words = ["trtexec", f"--onnx={path}", f"--saveEngine={part}", "--skipInference"]
    if len(profile) > 1:
        named = zip(("minShapes", "optShapes", "maxShapes"), profile, strict=True)
        words += [f"--{name}=image:{'x'.join(map(str, size))}" for name, size in named]
    done = subprocess.run(words, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode or not part.is_file() or not part.stat().st_size:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["nothing"]
        raise UserError(f"trtexec could not build an engine from {path} ({lines[-1][:300]}). {_ONNX_SAVED}")


def _by_package(path: Path, part: Path, profile: Sequence[Shape]) -> None:
    try:
        part.write_bytes(_engine(importlib.import_module("tensorrt"), path, profile))
    except (UserError, OSError):
        raise
    except Exception as error:  # raises many types, as without a GPU or with a mismatched driver
        raise UserError(f"TensorRT could not build an engine from {path} ({error}). {_ONNX_SAVED}") from error


def _engine(tensorrt: Any, path: Path, profile: Sequence[Shape]) -> bytes:
    log = tensorrt.Logger(tensorrt.Logger.WARNING)
    builder = tensorrt.Builder(log)
    network = builder.create_network(0)
    parser = tensorrt.OnnxParser(network, log)
    if not parser.parse_from_file(str(path)):
        reasons = "; ".join(parser.get_error(number).desc() for number in range(parser.num_errors)) or "no reason"
        raise UserError(f"TensorRT cannot read {path} ({reasons[:300]}). {_ONNX_SAVED}")
    config = builder.create_builder_config()
    if len(profile) > 1:
        sizes = builder.create_optimization_profile()
        sizes.set_shape("image", *profile)
        if config.add_optimization_profile(sizes) < 0:
            raise UserError(f"TensorRT does not accept the sizes {list(profile)} of {path}. {_ONNX_SAVED}")
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise UserError(f"TensorRT could not build an engine from {path}. {_ONNX_SAVED}")
    return bytes(engine)
