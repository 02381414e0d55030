"""Choice of the runtime for a trained model's file, with validation before anything is loaded."""

from os import PathLike
from pathlib import Path

from dinoseg.export.runtime.model import Model
from dinoseg.export.runtime.runtime import FILES, Options, file_in
from dinoseg.utils.errors import UserError

OF_A_CALL = {  # command-line terms to the arguments of `dinoseg.load`
    **{"resume=": "", "finite_weights=false loads it anyway.": ""},
    **{"engine.device=": "device=", "engine.precision=": "precision="},
    **{"backbone.weights=": "backbone=", "head.weights=": "head="},
    "the --config-dir DIR (or hydra.searchpath) of its training": "config_dir=DIR of its training",
}


def open_model(path: str | PathLike[str], options: Options) -> Model:
    """Open a trained model; errors are those of `load`."""
    where = Path(path).expanduser()
    try:
        return open_file(where, options)
    except UserError as error:
        words = str(error)
        for typed, given in OF_A_CALL.items():
            words = words.replace(typed, given)
        of_call = getattr(options, words.partition("=")[0], None) is not None or str(where) in words
        raise UserError(words if of_call else f"{where}: {words}") from error


def open_file(path: Path, options: Options) -> Model:
    """Open a trained model as `open_model` does, with errors in the terms of a command line with it as `resume`."""
    if path.is_dir() and not (path / "checkpoints").is_dir():  # a folder of mode=export or push_to_hub
        path = file_in(path, options.runtime) or path
    runtime = options.runtime or ("onnx" if path.suffix == ".onnx" else "torch")
    if runtime not in FILES:
        raise UserError(f"runtime={runtime} is unknown. Choose one of {', '.join(FILES)}.")
    if not path.exists():
        raise UserError(f"File not found: {path}. Give a file that mode=export wrote, a run folder or a checkpoint.")
    if runtime == "onnx":
        from dinoseg.export.runtime.onnx_model import load_onnx

        _check_onnx(path, options)
        return Model(*load_onnx(path, device=options.device))
    if path.suffix == ".pt2":
        raise UserError(
            f"{path} is a torch.export program, which torch.export.load reads. Give the model.safetensors or "
            "model.onnx of that model."
        )
    if path.suffix == ".onnx":
        raise UserError(f"{path} is an ONNX file, which runs without torch: leave runtime={runtime} out.")
    try:
        from dinoseg.export.runtime.torch_load import load_torch
    except ModuleNotFoundError as error:
        raise UserError(
            f"{path}: needs {error.name}, which is not installed: pip install . in a clone of dinoseg, or "
            "give the ONNX file that mode=export export=onnx writes of the model."
        ) from error
    return load_torch(path, options)


def _check_onnx(path: Path, options: Options) -> None:
    """Refuse options that an ONNX graph does not support."""
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
