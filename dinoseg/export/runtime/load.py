"""`dinoseg.load`: load a trained model from one file, on the runtime that the file needs."""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path

from dinoseg.export.runtime.model import Model
from dinoseg.export.runtime.opening import open_model
from dinoseg.export.runtime.runtime import Options


def load(
    path: str | PathLike[str],
    *,
    device: str = "auto",
    runtime: str | None = None,
    precision: str = "auto",
    backbone: str | PathLike[str] | None = None,
    head: str | PathLike[str] | None = None,
    inference: str | None = None,
    trust: Sequence[str] = (),
    config_dir: str | PathLike[str] | None = None,
) -> Model:
    """Load a trained model; nothing in the file is executed.

    A file of torch gives a `Segmenter`, a `torch.nn.Module` in eval mode. An ONNX file gives its base class `Model`,
    which predicts without torch.

    Args:
        path: what `mode=export` wrote (`model.safetensors`, `model.onnx`) or its folder, a run folder, a checkpoint.
        device: auto (CUDA, then MPS, then CPU), cuda, mps or cpu.
        runtime: torch or onnx; None: by the file.
        precision: auto, bf16 or fp32. auto is fp32 for a model trained or exported with `engine.precision=fp32`,
            otherwise bf16 where that is faster.
        backbone: weights for a file that holds only what was trained: a file, a folder or a hub id instead of the one
            that it names.
        head: weights for a head whose frozen part comes from a file, in the same way.
        inference: whole, windows or auto (whole images where memory suffices); None: as the file states.
        trust: hub ids that the file's backbone may come from, in addition to that of its option.
        config_dir: folder with config groups of your own, whose options the file may name; a class of a notebook is
            `__main__.NAME` there.

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
        device=device,
        runtime=runtime,
        precision=precision,
        backbone=backbone,
        head=head,
        inference=inference,
        trust=trust,
        config_dir=config_dir,
    )
    with collection_paused():
        model = open_model(path, options)
    model.source = Path(path).expanduser().absolute()
    return model


@contextmanager
def collection_paused() -> Iterator[None]:
    """Pause the cyclic garbage collector: it would traverse all objects of torch and timm several times (0.6 s)."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
