"""`dinoseg.load`: load a trained model from one file, on the runtime that the file needs."""

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from dinoseg.segmenter.model import Model
from dinoseg.segmenter.runtime import Options, file_in, list_model_files, load_ensemble, load_opener
from dinoseg.utils.collection import collection_paused
from dinoseg.utils.errors import UserError, name_parameters
from dinoseg.utils.files import expand_path
from dinoseg.utils.ranges import check_annotations

if TYPE_CHECKING:  # ONNX files need no torch
    import torch

_ARGUMENTS = {  # config keys to the arguments of `load` that set them
    **{"resume": "path", "engine.device": "device", "engine.precision": "precision"},
    **{"backbone.weights": "backbone", "head.weights": "head"},
}


@check_annotations
def load(
    path: str | PathLike[str] | Sequence[str | PathLike[str]],
    *,
    device: "str | torch.device" = "auto",
    runtime: str | None = None,
    precision: str = "auto",
    backbone: str | PathLike[str] | None = None,
    head: str | PathLike[str] | None = None,
    inference: str | None = None,
    trust: Sequence[str] = (),
    config_dir: str | PathLike[str] | None = None,
    offload: bool = False,
) -> Model:
    """Load a trained model.

    A file of torch gives a `Segmenter`, a `torch.nn.Module` in eval mode; nothing in the file is executed. An ONNX file
    gives its base class `Model`, which predicts without torch; onnxruntime loads it unchecked.

    A list of models gives a `Model` that averages their class probabilities.

    Args:
        path: what `mode=export` wrote (`model.safetensors`, `model.onnx`) or its folder, a run folder, a checkpoint, or
            a packaged model, `dinoseg:surgery` or `dinoseg:objects`; or a list of these.
        device: auto (CUDA, then MPS, then CPU), cuda, mps or cpu.
        runtime: torch or onnx; None: by the file.
        precision: auto, bf16 or fp32. auto is fp32 for a model trained or exported with `engine.precision=fp32`,
            otherwise bf16 where that is faster.
        backbone: weights for a file that holds only trained weights: a file, a folder or a hub id instead of the one
            that it names.
        head: weights for a head whose frozen part comes from a file, in the same way.
        inference: whole, windows or auto (whole images where memory suffices); None: as the file states.
        trust: hub ids that the file's backbone may come from, in addition to that of its option.
        config_dir: folder with config groups of your own, whose options the file may name; a class of a notebook is
            `__main__.NAME` there.
        offload: of a list: one model at a time is on the device, which takes less memory and more time.

    An ONNX file takes whole images, computes in float32 and holds all of its weights.

    Raises:
        UserError: if the file is missing, damaged, foreign or of a newer version, describes no model of dinoseg, or
            does not support an argument.

    Examples:
        >>> import dinoseg, pathlib, tempfile
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "model.safetensors"
        >>> dinoseg.create_model("rgb", classes=["ground", "leaf"]).save(file)
        >>> dinoseg.load(file).classes
        ('ground', 'leaf')
    """
    options = Options(
        device=str(device),
        runtime=runtime,
        precision=precision,
        backbone=backbone,
        head=head,
        inference=inference,
        trust=trust,
        config_dir=config_dir,
    )
    if not isinstance(path, str | PathLike):
        found: Model = load_ensemble()(offload=offload).open([open_path(each, options) for each in path])
        return found
    if offload:
        raise UserError(
            "offload=True moves the models of a list to the device in turn, and path is one model. Leave it out."
        )
    return open_path(path, options)


def open_path(path: str | PathLike[str], options: Options) -> Model:
    """Return one model as `load` does."""
    where = expand_path(path, ".safetensors")
    try:
        with collection_paused(), name_parameters(_ARGUMENTS):
            model = open_file(where, options)
    except UserError as error:
        message = str(error)
        raise UserError(message if str(where) in message else f"{where}: {message}") from error
    model.source = where.absolute()
    return model


def open_file(path: Path, options: Options, *, key: str = "resume") -> Model:
    """Open a trained model as `load` does, with errors in the terms of a command line with it as `key`."""
    if path.is_dir() and not (path / "checkpoints").is_dir():  # a folder of mode=export or push_to_hub
        path = file_in(path, options.runtime) or path
    runtimes = list_model_files()
    usual = path.suffix.removeprefix(".")
    runtime = options.runtime or (usual if usual in runtimes else "torch")
    if runtime not in runtimes:
        raise UserError(f"runtime={runtime} is unknown. Choose one of {', '.join(runtimes)}.")
    if runtime != "torch":
        opened: Model = load_opener(runtime)(path, options)
        return opened
    from dinoseg.segmenter.segmenter import load_torch

    return load_torch(path, options, key=key)
