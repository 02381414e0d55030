"""Inference with an ONNX file by onnxruntime, without torch."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from dinoseg.extensions.export.onnx_pictures import GraphRuntime
from dinoseg.extensions.export.onnx_record import KEY, OUTPUTS, GraphRecord, parse
from dinoseg.segmenter.facts import ModelFacts
from dinoseg.segmenter.model import Model
from dinoseg.segmenter.runtime import Opened, Options
from dinoseg.utils.atomic import atomic_file
from dinoseg.utils.errors import UserError

ONNX_FILE = "model.onnx"
ONNX_WEIGHTS = "model.onnx.data"  # weights of an ONNX file that would exceed the 2 GiB of a protobuf message
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_INPUT = "image"
_SILENT = 3  # errors only
# float32; otherwise int8 products round activations to int8
_ACCURACY = ("session.qdq_matmulnbits_accuracy_level", "1")


class OnnxModel(Model):
    """A trained model in an ONNX file; a large one has its weights in a second file."""

    def _copy_file(self, file: Path, target: Path) -> None:
        # a model names its weights file in plain bytes
        if ONNX_WEIGHTS.encode() in file.read_bytes():
            # other copies in the same folder could overwrite these weights
            if target.name != ONNX_FILE:
                raise UserError(
                    f"{file} has its weights in {ONNX_WEIGHTS}. Name its copy {ONNX_FILE}, not {target.name}."
                )
            with atomic_file(target.with_name(ONNX_WEIGHTS)) as part:
                shutil.copyfile(file.with_name(ONNX_WEIGHTS), part)
        super()._copy_file(file, target)


def open_onnx(path: Path, options: Options) -> OnnxModel:
    """Return the model in an ONNX file.

    Raises:
        UserError: as `load_onnx`, or an option is given that an ONNX graph does not support.
    """
    given = {"backbone.weights": options.backbone, "head.weights": options.head, "inference": options.inference}
    requested = {
        key: value for key, value in given.items() if value is not None and (key, value) != ("inference", "whole")
    }
    if options.precision not in ("auto", "fp32"):
        requested["engine.precision"] = options.precision
    for key, value in requested.items():
        raise UserError(
            f"{key}={value}: {path} is an ONNX file, which processes whole images, computes in float32 and holds all "
            "of its weights. Leave it out, or give the model.safetensors of that model."
        )
    return OnnxModel(*load_onnx(path, device=options.device))


def load_onnx(path: Path, *, device: str = "auto", threads: int | None = None) -> Opened:
    """Load an ONNX file that `mode=export export=onnx` wrote: return its runtime, facts and path.

    Args:
        path: the file; the weights of a large one lie in the same folder.
        device: auto (CUDA where this onnxruntime has it, else CPU), cuda or cpu.
        threads: number of compute threads; None: one for each core.

    Raises:
        UserError: if the file is foreign or of another version, or onnxruntime is missing or cannot load it.
    """
    session = open_session(path, device=device, threads=threads)
    text = session.get_modelmeta().custom_metadata_map.get(KEY)
    if text is None:
        raise UserError(
            f"{path} is not an ONNX file of dinoseg: its metadata has no entry {KEY!r}. Give a file that mode=export "
            "export=onnx wrote."
        )
    description = parse(text, str(path))
    record = GraphRecord.of(description["graph"], str(path))
    facts = ModelFacts.of(description, str(path))
    if record.thresholds is not None and len(record.thresholds) != len(facts.classes):
        raise UserError(
            f"{path} has {len(record.thresholds)} thresholds and {len(facts.classes)} classes. Export the model again."
        )
    if record.objects is not None:
        labels = [*record.objects["things"], record.objects["background"] or 0]
        if record.kind != "masks" or max(labels) >= len(facts.classes):
            raise UserError(f"{path} cannot find objects of its {len(facts.classes)} classes. Export the model again.")
    names = list(OUTPUTS[record.kind])

    def compute(pixels: np.ndarray) -> list[np.ndarray]:
        try:
            return session.run(names, {_INPUT: pixels})
        except Exception as error:  # its errors share no class but this one
            raise UserError(
                f"{path}: onnxruntime cannot process images {list(pixels.shape)} with it ({_reason(error)}). Give "
                "smaller images, or export the model again."
            ) from error

    return Opened(GraphRuntime(compute, record), facts, path)


def open_session(path: Path, *, device: str = "auto", threads: int | None = None) -> Any:
    """Return onnxruntime's session for a file; arguments as of `load_onnx`.

    Raises:
        UserError: if onnxruntime is missing, or cannot load the file on the device.
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
    options.add_session_config_entry(*_ACCURACY)
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        providers = [name for name in dict.fromkeys(wanted) if name in there]
        return onnxruntime.InferenceSession(path, options, providers)
    except Exception as error:  # its errors share no class but this one
        raise UserError(
            f"{path}: onnxruntime {runtime_version()} cannot load it ({_reason(error)}). Check that the file is "
            f"complete and that {ONNX_WEIGHTS}, if it was exported with one, lies next to it. Or install a newer "
            "onnxruntime, or export the model again, with a lower export.opset."
        ) from error


def runtime_version() -> str:
    """Return the version of onnxruntime."""
    import onnxruntime

    return onnxruntime.__version__


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _names(providers: list[str]) -> list[str]:
    return [name for name, provider in _PROVIDERS.items() if provider in providers]
