"""The exported graph of a trained model: its module, the record that describes it, and its trace."""

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from dinoseg.core.contracts import require_classes
from dinoseg.core.geometry import upsample
from dinoseg.core.shapes import MaskOutputs
from dinoseg.core.sizes import Size
from dinoseg.core.task import ObjectTask
from dinoseg.extensions.export.onnx_record import GraphRecord
from dinoseg.extensions.export.options import LARGEST_SIDE, MAX_PIXELS, GraphOptions
from dinoseg.inference.trained_sizes import TrainedSizes
from dinoseg.models.model import SegmentationModel
from dinoseg.utils.errors import UserError

MAX_CELLS = 4096  # maximum of a dynamic graph's patch rows, patch columns and batch size
_EXAMPLE = (2, 3, 5)  # batch, patch rows and columns: all different, so that torch.export keeps the dimensions apart


class Graph(nn.Module):
    """Module that maps images (B, C, H, W), float in 0..1, to the outputs that `GraphRecord` describes."""

    def __init__(self, segmenter: SegmentationModel, record: GraphRecord) -> None:
        super().__init__()
        self.backbone = segmenter.backbone
        self.head = segmenter.head
        self.record = record

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Return the head's outputs or, for the kind `pixels`, the class scores of each pixel."""
        outputs = self.head.run(self.backbone, image)
        masks = isinstance(outputs, MaskOutputs)
        if self.record.kind != "pixels":
            return (outputs.class_logits, outputs.mask_logits) if masks else (outputs,)
        size = (image.shape[-2], image.shape[-1])
        if not masks:
            return (upsample(outputs, size, (1.0, 1.0)),)
        classes = outputs.class_logits.float().softmax(dim=-1)
        classes = classes[..., :-1] if self.record.no_object else classes
        pixels = upsample(outputs.mask_logits, size, (1.0, 1.0)).sigmoid()
        return (torch.einsum("bqk,bqhw->bkhw", classes, pixels),)


def record_of(
    segmenter: SegmentationModel,
    sizes: TrainedSizes | None,
    options: GraphOptions,
    picture: Size,
    *,
    opset: int | None = None,
    precision: str = "float32",
) -> tuple[GraphRecord, str | None]:
    """Return the record of a model's graph, and the reason why its size is fixed (None: it is dynamic).

    Args:
        segmenter: in eval mode.
        sizes: of its training images.
        options: the export options.
        picture: (H, W) of an image; fixes the size where the graph cannot be dynamic and `options` give none.
        opset: of an ONNX file.
        precision: of the stored weights.

    Raises:
        UserError: if the model has no classes, predicts objects and `export.pixels=true`, the size is too large or no
            multiple of the patch size, or `export.dynamic=true` contradicts the head.
    """
    head = segmenter.head
    require_classes(head, "The model to export")
    task = segmenter.task
    objects = task.graph_options if isinstance(task, ObjectTask) else None
    if isinstance(task, ObjectTask) and options.pixels:
        raise UserError(
            "export.pixels=true gives classes of pixels, and this model predicts single objects. Leave it out."
        )
    if isinstance(task, ObjectTask) and objects is None:
        raise UserError(
            f"A graph finds the objects of task=instance and task=panoptic, and not those of "
            f"{type(task).__name__}. Choose export=safetensors."
        )
    reason = _reason(segmenter, options)
    fill = [float(value) for value in segmenter.backbone.mean.flatten()]
    kind = "pixels" if options.pixels else "masks" if head.mixture else "scores"
    record = GraphRecord(
        multiple=segmenter.patch_size,
        scale=float(segmenter.scale),
        longest=segmenter.longest,
        typical=sizes.typical if sizes else None,
        largest=sizes.largest if sizes else None,
        size=None,
        batch=None,
        fill=tuple(fill),
        kind=kind,
        mixture=head.mixture,
        no_object=head.no_object,
        opset=opset,
        precision=precision,
        thresholds=task.thresholds,
        objects=objects,
    )
    if reason is None:
        return record, None
    fixed = options.fixed_size_reason or record.layout(picture).padded
    multiple = segmenter.patch_size
    if any(side % multiple for side in fixed):
        near = [max(1, round(side / multiple)) * multiple for side in fixed]
        raise UserError(f"export.size={list(fixed)}: give multiples of the patch size, {multiple} px, such as {near}.")
    if max(fixed) > LARGEST_SIDE or math.prod(fixed) > MAX_PIXELS:
        raise UserError(
            f"The graph would use the size of the first image, {list(fixed)} ({reason}), which is too large. Set "
            "export.size=[H,W], or smaller images in export.images."
        )
    return replace(record, size=fixed, batch=1), reason


def trace(segmenter: SegmentationModel, record: GraphRecord) -> torch.export.ExportedProgram:
    """Trace the graph with torch.export and return the program.

    Raises:
        UserError: if tracing fails; the message quotes torch's reason.
    """
    graph, patch = Graph(segmenter, record).eval(), record.multiple
    batch, rows, columns = _EXAMPLE
    channels = segmenter.backbone.channels
    example = (batch, channels, rows * patch, columns * patch)
    shapes = None
    if record.size is None:
        dims = [torch.export.Dim(name, min=1, max=MAX_CELLS) for name in ("batch", "rows", "columns")]
        shapes = ({0: dims[0], 2: patch * dims[1], 3: patch * dims[2]},)
    else:
        example = (record.batch or 1, channels, *record.size)
    try:
        with torch.no_grad():
            return torch.export.export(graph, (torch.rand(example),), dynamic_shapes=shapes)
    except Exception as error:  # torch.export raises many exception types
        raise UserError(cannot(error, record)) from error


def cannot(error: Exception, record: GraphRecord) -> str:
    """Return the error message of a failed export."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
    remedy = "Set export.dynamic=false for one size." if record.size is None else "Choose another backbone or head."
    return f"This model cannot be exported with {_describe_size(record)}: {reason}. {remedy}"


def _describe_size(record: GraphRecord) -> str:
    return "an open size" if record.size is None else f"the size {list(record.size)}"


def _reason(segmenter: SegmentationModel, options: GraphOptions) -> str | None:
    fixed_size_reason = segmenter.head.fixed_size_reason
    if options.dynamic and fixed_size_reason is not None:
        raise UserError(
            f"export.dynamic=true: {fixed_size_reason}. Set export.dynamic=null, and export.size=[H,W] for another "
            "size than that of the images."
        )
    return options.why_fixed or fixed_size_reason
