"""TensorRT's engine of an ONNX file, where TensorRT is: by trtexec, or by its Python package."""

import importlib
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dinoseg.errors import UserError
from dinoseg.portable.onnx_record import GraphRecord
from dinoseg.storage.atomic import whole_file

SUFFIX = ".engine"
_PATCHES = (16, 32, 64)  # of an open graph: least, commonest and most rows and columns
_BATCHES = (1, 1, 8)


def check_tensorrt() -> None:
    """Refuse to build an engine where TensorRT is not.

    Raises:
        UserError: naming what is missing.
    """
    if shutil.which("trtexec") is None and find_spec("tensorrt") is None:
        raise UserError(
            "export.tensorrt=true: neither trtexec nor the Python package tensorrt is here. Install TensorRT on the "
            "machine with the GPU that the engine is for, or build it there from model.onnx."
        )


def build_engine(path: Path, record: GraphRecord) -> Path:
    """Build the engine of a proven ONNX file beside it, and return its path; the engine itself is not proven.

    Raises:
        UserError: TensorRT is not here, or fails; the message says what it says.
    """
    check_tensorrt()
    place = path.with_suffix(SUFFIX)
    with whole_file(place) as part:
        build = _by_command if shutil.which("trtexec") is not None else _by_package
        build(path, part, shapes(record))
    print(f"written to {place}: {place.stat().st_size / 1e6:.2f} MB, for this GPU and TensorRT alone; not proven")
    return place


def shapes(record: GraphRecord) -> list[tuple[int, int, int, int]]:
    """Return the smallest, commonest and largest (B, 3, H, W) that an engine takes; one of them where it is fixed."""
    if record.size is not None:
        return [(record.batch or 1, 3, *record.size)]
    return [
        (batch, 3, cells * record.multiple, cells * record.multiple)
        for batch, cells in zip(_BATCHES, _PATCHES, strict=True)
    ]


def _by_command(path: Path, part: Path, sizes: list[tuple[int, int, int, int]]) -> None:
    words = ["trtexec", f"--onnx={path}", f"--saveEngine={part}", "--skipInference"]
    if len(sizes) > 1:
        named = zip(("minShapes", "optShapes", "maxShapes"), sizes, strict=True)
        words += [f"--{name}=image:{'x'.join(map(str, size))}" for name, size in named]
    done = subprocess.run(words, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode or not part.is_file():
        said = (done.stderr or done.stdout).strip().splitlines() or ["nothing"]
        raise UserError(f"trtexec could not build an engine of {path} (it says: {said[-1][:300]}). See its log.")


def _by_package(path: Path, part: Path, sizes: list[tuple[int, int, int, int]]) -> None:
    tensorrt: Any = importlib.import_module("tensorrt")
    log = tensorrt.Logger(tensorrt.Logger.ERROR)
    builder = tensorrt.Builder(log)
    network = builder.create_network(0)
    parser = tensorrt.OnnxParser(network, log)
    if not parser.parse_from_file(str(path)):
        raise UserError(f"TensorRT cannot read {path} ({parser.get_error(0).desc()}). Choose another export.opset.")
    config = builder.create_builder_config()
    if len(sizes) > 1:
        profile = builder.create_optimization_profile()
        profile.set_shape("image", *sizes)
        config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise UserError(f"TensorRT could not build an engine of {path}. See what it printed above.")
    part.write_bytes(bytes(engine))
