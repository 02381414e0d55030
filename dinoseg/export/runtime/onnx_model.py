"""Inference with an ONNX file by onnxruntime, without torch."""

import functools
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from dinoseg.export.runtime.facts import ModelFacts
from dinoseg.export.runtime.onnx_check import external_data, read_metadata
from dinoseg.export.runtime.onnx_pictures import GraphRuntime
from dinoseg.export.runtime.onnx_record import KEY, OUTPUTS, GraphRecord, parse
from dinoseg.export.runtime.runtime import Opened
from dinoseg.utils.cores import machine_memory
from dinoseg.utils.errors import UserError
from dinoseg.utils.wording import format_value

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_INPUT = "image"
_MEMORY_SHARE = 0.75  # share of the machine that this process's graphs may use on the CPU
_UNFOLDED = ["ConstantFolding"]  # would compute at load time, outside the bounded allocator
_SILENT = 3  # errors only
_SETTINGS = {
    "session.load_model_format": "ONNX",  # the validated format, whatever the suffix
    "session.use_env_allocators": "1",  # registered by `_bound_memory`
    "session.qdq_matmulnbits_accuracy_level": "1",  # float32; otherwise int8 products round activations to int8
}


def load_onnx(path: Path, *, device: str = "auto", threads: int | None = None) -> Opened:
    """Load an ONNX file that `mode=export export=onnx` wrote: return its runtime, facts and path.

    Args:
        path: the file; external data lies in the same folder.
        device: auto (CUDA where this onnxruntime has it, else CPU), cuda or cpu.
        threads: number of compute threads; None: one for each core.

    Raises:
        UserError: if the file is damaged, foreign or of a newer version, or onnxruntime is missing or cannot run it.
    """
    description = parse(read_metadata(path, KEY), str(path))
    record = GraphRecord.of(description["graph"], str(path))
    facts = ModelFacts.of(description, str(path))
    if record.thresholds is not None and len(record.thresholds) != len(facts.classes):
        raise UserError(
            f"{path} has {len(record.thresholds)} thresholds and {len(facts.classes)} classes. Export the model again."
        )
    session = open_session(path, device=device, threads=threads)
    inputs = [(entry.name, entry.type, len(entry.shape)) for entry in session.get_inputs()]
    names = [entry.name for entry in session.get_outputs()]
    has_channels = len(record.fill) == facts.format.channels
    if not has_channels or inputs != [(_INPUT, "tensor(float)", 4)] or names != list(OUTPUTS[record.kind]):
        raise UserError(f"{path}: its inputs or outputs differ from its description. Export the model again.")

    def compute(pixels: np.ndarray) -> list[np.ndarray]:
        try:
            outputs = session.run(names, {_INPUT: pixels})
        except Exception as error:  # its errors share no class but this one
            raise UserError(
                f"{path}: onnxruntime cannot process images {list(pixels.shape)} with it ({_reason(error)}). Give "
                "smaller images, or export the model again."
            ) from error
        _check_outputs(outputs, record, len(facts.classes), len(pixels), str(path))
        return outputs

    return Opened(GraphRuntime(compute, record), facts, path)


def parts_of(path: Path, name: str) -> list[Path]:
    """Return the files of a model for a copy named `name`: the files of its weights, and the model itself last.

    Raises:
        UserError: if the file is damaged, or the name of its weight file does not match `name`.
    """
    data_files = external_data(path, KEY) if path.suffix == ".onnx" else []
    other = next((data for data in data_files if data != f"{name}.data"), None)
    if other is not None:
        raise UserError(
            f"{path} refers to its weights as {format_value(other)}, so it cannot be renamed to {name}. Keep its name, "
            f"{format_value(other.removesuffix('.data'))}, or export it again."
        )
    return [*map(path.with_name, data_files), path]


def _check_outputs(outputs: list[np.ndarray], record: GraphRecord, num_classes: int, batch: int, where: str) -> None:
    """Refuse outputs whose shapes or types do not match the batch and the classes, whatever the file states."""
    maps = outputs[-1]
    columns = outputs[0].shape[1] if outputs[0].ndim > 1 else 0  # classes, or queries
    shapes = [(batch, columns, num_classes + record.no_object)] if record.kind == "masks" else []
    wanted = [*shapes, (batch, columns if shapes else num_classes, *maps.shape[2:])]
    is_valid = [part.shape for part in outputs] == wanted and maps.ndim == 4 and maps.size > 0
    if not is_valid or any(part.dtype.kind != "f" for part in outputs):
        given = ", ".join(f"{part.dtype} {list(part.shape)}" for part in outputs)
        raise UserError(
            f"{where}: returns {given} for {batch} images, which are not scores of its {num_classes} classes. Export "
            "the model again."
        )


def open_session(path: Path, *, device: str = "auto", threads: int | None = None) -> Any:
    """Return onnxruntime's session for a validated file; arguments as of `load_onnx`.

    Raises:
        UserError: if onnxruntime is missing, or cannot run the file on the device.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError(f"{path}: ONNX files need onnxruntime: pip install onnxruntime.") from error
    there = onnxruntime.get_available_providers()
    if device not in ("auto", *_PROVIDERS) or (device != "auto" and _PROVIDERS[device] not in there):
        raise UserError(
            f"engine.device={device}: this onnxruntime computes on {', '.join(_names(there))}. Choose one of them or "
            "auto; for CUDA install onnxruntime-gpu."
        )
    wanted = [_PROVIDERS["cuda"], _PROVIDERS["cpu"]] if device == "auto" else [_PROVIDERS[device], _PROVIDERS["cpu"]]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _SILENT
    for key, value in _SETTINGS.items():
        options.add_session_config_entry(key, value)
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        _bound_memory()
        providers = [name for name in dict.fromkeys(wanted) if name in there]
        return onnxruntime.InferenceSession(path, options, providers, disabled_optimizers=_UNFOLDED)
    except Exception as error:  # its errors share no class but this one
        raise UserError(
            f"{path}: onnxruntime {runtime_version()} cannot run it ({_reason(error)}). Install a newer one, or export "
            "the model again, with a lower export.opset."
        ) from error


@functools.cache
def _bound_memory() -> None:
    """Let this process's sessions share one bounded allocator: a small file can describe tensors of any size."""
    import onnxruntime as ort

    memory = machine_memory()
    if memory < float("inf"):
        kind = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
        with suppress(Exception):  # fails where the calling program has registered one: that one is used
            ort.create_and_register_allocator(kind, ort.OrtArenaCfg({"max_mem": int(_MEMORY_SHARE * memory)}))


def runtime_version() -> str:
    """Return the version of onnxruntime."""
    import onnxruntime

    return onnxruntime.__version__


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _names(providers: list[str]) -> list[str]:
    return [name for name, provider in _PROVIDERS.items() if provider in providers]
