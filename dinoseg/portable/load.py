"""`dinoseg.load`: a trained model as one file, ready to use, by whatever runtime the file is of."""

from collections.abc import Sequence
from os import PathLike
from pathlib import Path

from dinoseg.errors import UserError
from dinoseg.portable.model import Model

RUNTIMES = ("torch", "onnx")


def load(
    path: str | PathLike[str],
    *,
    device: str = "auto",
    runtime: str | None = None,
    precision: str = "auto",
    backbone: str | PathLike[str] | None = None,
    head: str | PathLike[str] | None = None,
    trust: Sequence[str] = (),
) -> Model:
    """Return the trained model of a file, ready to predict; nothing in the file is executed.

    Args:
        path: what `mode=export` wrote (`model.safetensors`, `model.onnx`), a run folder, or a checkpoint.
        device: auto (CUDA, then MPS, then CPU), cuda, mps or cpu.
        runtime: torch or onnx; None: by the file.
        precision: auto (bf16 where the device has it), bf16 or fp32.
        backbone: weights for a file that holds what was trained alone: a file, a folder or a hub id instead of the one
            that it names.
        head: the same of a head whose frozen part comes from a file.
        trust: packages and hub ids that the file may name beside what dinoseg ships.

    Raises:
        UserError: no such file, or it is damaged, foreign, of a newer version, or says what no model of dinoseg does.
    """
    where = Path(path).expanduser()
    kind = runtime or ("onnx" if where.suffix == ".onnx" else "torch")
    if kind not in RUNTIMES:
        raise UserError(f"runtime={runtime} is unknown. Choose one of {', '.join(RUNTIMES)}.")
    if not where.exists():
        raise UserError(f"No such file: {where}. Give a file that mode=export wrote, a run folder or a checkpoint.")
    if kind == "onnx":
        raise UserError(f"{where}: ONNX files cannot be read yet.")
    if where.suffix == ".onnx":
        raise UserError(f"{where} is an ONNX file, which runs without torch: leave runtime={runtime} out.")
    from dinoseg.portable.torch_runtime import load_torch

    weights = {"backbone": _text(backbone), "head": _text(head)}
    try:
        return load_torch(where, device=device, precision=precision, weights=weights, trust=trust)
    except UserError as error:
        # the words of a command line, as a function's arguments
        words = str(error).replace("resume=", "").replace("finite_weights=false uses it all the same.", "")
        for part in weights:
            words = words.replace(f"{part}.weights=", f"{part}=")
        words = words.replace("engine.device=", "device=")
        of_call = words.startswith(("device=", "precision=")) or str(where) in words
        raise UserError(words if of_call else f"{where}: {words}") from error


def _text(place: str | PathLike[str] | None) -> str | None:
    return None if place is None else str(place)
