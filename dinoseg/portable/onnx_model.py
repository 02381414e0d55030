"""An ONNX file as a model to use: onnxruntime computes, and torch is not needed."""

from pathlib import Path
from typing import Any

import numpy as np

from dinoseg.errors import UserError
from dinoseg.portable.facts import Facts
from dinoseg.portable.onnx_check import read_metadata
from dinoseg.portable.onnx_pictures import GraphRuntime
from dinoseg.portable.onnx_record import KEY, GraphRecord, parse
from dinoseg.portable.runtime import Opened

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_INPUT = "image"
_SILENT = 3  # errors alone


def load_onnx(path: Path, *, device: str = "auto", threads: int | None = None) -> Opened:
    """Return what computes for an ONNX file that `mode=export export=onnx` wrote, and what it says.

    Args:
        path: the file; data that is kept beside it lies in the same folder.
        device: auto (CUDA where this onnxruntime has it, else CPU), cuda or cpu.
        threads: that compute; None: one for each core.

    Raises:
        UserError: it is damaged, foreign, of a newer version, or onnxruntime is missing or cannot run it there.
    """
    description = parse(read_metadata(path, KEY), str(path))
    record = GraphRecord.of(description["graph"], str(path))
    facts = Facts.of(description, str(path))
    session = open_session(path, device=device, threads=threads)
    if [entry.name for entry in session.get_inputs()] != [_INPUT]:
        raise UserError(f"{path}: takes something else than one batch of pictures. Export the model again.")

    def compute(pixels: np.ndarray) -> list[np.ndarray]:
        return session.run(None, {_INPUT: pixels})

    return Opened(GraphRuntime(compute, record), facts, path)


def open_session(path: Path, *, device: str = "auto", threads: int | None = None) -> Any:
    """Return onnxruntime's session of a file that was looked at; arguments as of `load_onnx`.

    Raises:
        UserError: onnxruntime is missing, or cannot run it there.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError(f"{path}: ONNX files need onnxruntime: pip install 'dinoseg[runtime]'.") from error
    there = onnxruntime.get_available_providers()
    if device not in ("auto", *_PROVIDERS) or (device != "auto" and _PROVIDERS[device] not in there):
        raise UserError(
            f"engine.device={device}: this onnxruntime computes on {', '.join(_names(there))}. Choose one of them or "
            "auto; for CUDA install onnxruntime-gpu."
        )
    wanted = [_PROVIDERS["cuda"], _PROVIDERS["cpu"]] if device == "auto" else [_PROVIDERS[device], _PROVIDERS["cpu"]]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _SILENT
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        return onnxruntime.InferenceSession(path, options, [name for name in dict.fromkeys(wanted) if name in there])
    except Exception as error:  # its errors share no class but this one
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise UserError(f"{path}: onnxruntime cannot run it ({reason}). Export the model again.") from error


def runtime_version() -> str:
    """Return the version of onnxruntime."""
    import onnxruntime

    return onnxruntime.__version__


def _names(providers: list[str]) -> list[str]:
    return [name for name, provider in _PROVIDERS.items() if provider in providers]
