"""A trained model's file opened by the runtime that it is of, before anything of it is believed."""

from collections.abc import Sequence
from os import PathLike
from pathlib import Path

from dinoseg.errors import UserError
from dinoseg.portable.hub import FILES
from dinoseg.portable.runtime import Opened

RUNTIMES = ("torch", "onnx")


def open_model(
    path: str | PathLike[str],
    *,
    device: str = "auto",
    runtime: str | None = None,
    precision: str = "auto",
    backbone: str | PathLike[str] | None = None,
    head: str | PathLike[str] | None = None,
    inference: str | None = None,
    trust: Sequence[str] = (),
) -> Opened:
    """Return what computes for a trained model and what its file says; arguments and errors are those of `load`."""
    where = Path(path).expanduser()
    if where.is_dir() and not (where / "checkpoints").is_dir():  # what mode=export, or push_to_hub, has left there
        where = next((where / name for name in FILES.values() if (where / name).is_file()), where)
    kind = runtime or ("onnx" if where.suffix == ".onnx" else "torch")
    if kind not in RUNTIMES:
        raise UserError(f"runtime={runtime} is unknown. Choose one of {', '.join(RUNTIMES)}.")
    if not where.exists():
        raise UserError(f"No such file: {where}. Give a file that mode=export wrote, a run folder or a checkpoint.")
    if kind == "onnx":
        from dinoseg.portable.onnx_model import load_onnx

        return load_onnx(where, device=device)
    if where.suffix == ".onnx":
        raise UserError(f"{where} is an ONNX file, which runs without torch: leave runtime={runtime} out.")
    try:
        from dinoseg.portable.torch_runtime import load_torch
    except ModuleNotFoundError as error:
        raise UserError(
            f"{where}: needs {error.name}, which is not installed: pip install dinoseg with all that it depends on, or "
            "give the ONNX file that mode=export export=onnx writes of the model."
        ) from error

    weights = {"backbone": _text(backbone), "head": _text(head)}
    try:
        return load_torch(where, device=device, precision=precision, weights=weights, inference=inference, trust=trust)
    except UserError as error:
        # the words of a command line, as a function's arguments
        words = str(error).replace("resume=", "").replace("finite_weights=false uses it all the same.", "")
        for part in weights:
            words = words.replace(f"{part}.weights=", f"{part}=")
        words = words.replace("engine.device=", "device=")
        of_call = words.startswith(("device=", "precision=", "inference=")) or str(where) in words
        raise UserError(words if of_call else f"{where}: {words}") from error


def _text(place: str | PathLike[str] | None) -> str | None:
    return None if place is None else str(place)
