"""`dinoseg.load`: a trained model as one file, ready to use, by whatever runtime the file is of."""

from collections.abc import Sequence
from os import PathLike

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
) -> Model:
    """Return the trained model of a file, ready to predict; nothing in the file is executed.

    Args:
        path: what `mode=export` wrote (`model.safetensors`, `model.onnx`) or its folder, a run folder, a checkpoint.
        device: auto (CUDA, then MPS, then CPU), cuda, mps or cpu.
        runtime: torch or onnx; None: by the file.
        precision: auto (bf16 where it is faster), bf16 or fp32.
        backbone: weights for a file that holds what was trained alone: a file, a folder or a hub id instead of the one
            that it names.
        head: the same of a head whose frozen part comes from a file.
        inference: whole, windows or auto (whole images where there is memory for them); None: as the file says.
        trust: packages and hub ids that the file may name beside what dinoseg ships.

    An ONNX file takes pictures whole, computes in float32 and holds all of its weights.

    Raises:
        UserError: no such file, or it is damaged, foreign, of a newer version, or says what no model of dinoseg does;
            or an argument is none that it takes.
    """
    options = Options(
        device=device,
        runtime=runtime,
        precision=precision,
        backbone=backbone,
        head=head,
        inference=inference,
        trust=trust,
    )
    return Model(*open_model(path, options))
