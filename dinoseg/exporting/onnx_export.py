"""export=onnx: a trained model as an ONNX file that has answered real pictures as the model does."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from dinoseg.errors import UserError
from dinoseg.exporting import onnx_file
from dinoseg.exporting.export import keep_if_proven, prepared
from dinoseg.exporting.graph import Wish, trace
from dinoseg.exporting.layers import differing_layer
from dinoseg.exporting.proof import Limits
from dinoseg.exporting.tensorrt import build_engine, check_tensorrt
from dinoseg.ranges import Count, NotNegative, Share

NAME = "model.onnx"


def export_onnx(
    cfg: DictConfig,
    *,
    out_dir: Path,
    opset: Count = 18,
    dynamic: bool | None = None,
    size: Sequence[Count] | None = None,
    pixels: bool = False,
    precision: str = "float32",
    images: str = "val",
    count: Count = 16,
    least_agreement: Share = 0.999,
    most_points: NotNegative = 0.1,
    gated: bool = False,
    tensorrt: bool = False,
) -> dict[str, Any]:
    """Write the model that `resume` names to `out_dir`/model.onnx, once it is proven, and export_report.json beside it.

    Args:
        cfg: the whole config, merged with the checkpoint's.
        out_dir: the run folder.
        opset: version of ONNX's operators, at least 18.
        dynamic: leave batch and size open; None: where backbone and head can, else fixed with the reason said.
        size: (H, W) of the graph's input, multiples of the patches; None: any, or that of the first picture.
        pixels: let the graph of one size give class scores of each pixel itself, for use without dinoseg.
        precision: of the weights: float32, float16 or int8 with a scale for each channel; computed in float32.
        images: pictures that it is proven on: a split of the data set, a folder or a pattern.
        count: at most so many of them.
        least_agreement: share of pixels that must have the model's class.
        most_points: of mIoU that it may differ by.
        gated: write weights into the file whose licence forbids passing them on freely: it goes no further.
        tensorrt: build TensorRT's engine from the file, too, where TensorRT is.

    Raises:
        UserError: it cannot be exported, or what was written answers otherwise than the model; the file is not kept.
    """
    onnx_file.check_opset(opset)
    if tensorrt:
        check_tensorrt()
    wish = Wish(dynamic, check_size(size), pixels)
    limits = Limits(least_agreement, most_points)
    with prepared(
        cfg, out_dir, wish, images=images, count=count, gated=gated, opset=opset, precision=precision
    ) as ready:
        model = onnx_file.to_onnx(trace(ready.reference.segmenter, ready.record), ready.record)
        scopes = onnx_file.scopes_of(model)
        onnx_file.finish(model, ready.record, ready.facts.description())
        files = onnx_file.write(model, ready.folder / NAME)
        first = ready.pictures[0].path
        report = keep_if_proven(
            ready, "onnx", files, out_dir, limits, lambda: differing_layer(files[-1], scopes, ready.reference, first)
        )
    path = out_dir / NAME
    print(f'use: import dinoseg; model = dinoseg.load("{path}"); out = model.predict("picture.jpg")')
    engine = {"engine": str(build_engine(path, ready.record))} if tensorrt else {}
    return {"path": str(path), "agreement": report["agreement"], **engine}


def check_size(size: Sequence[int] | None) -> tuple[int, int] | None:
    """Return the size of a graph's input.

    Raises:
        UserError: it is no pair.
    """
    if size is None:
        return None
    if len(size) != 2:
        raise UserError(f"export.size={list(size)}: give [H,W], such as [512,512], or null.")
    return size[0], size[1]
