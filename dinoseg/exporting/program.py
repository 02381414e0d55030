"""export=program: a trained model as a program of torch.export, which runs without dinoseg's code."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from dinoseg.exporting.export import keep_if_proven, prepared
from dinoseg.exporting.graph import Wish, trace
from dinoseg.exporting.onnx_export import check_size
from dinoseg.exporting.proof import Limits
from dinoseg.portable.onnx_record import KEY
from dinoseg.ranges import Count, NotNegative, Share

NAME = "model.pt2"


def export_program(
    cfg: DictConfig,
    *,
    out_dir: Path,
    dynamic: bool | None = None,
    size: Sequence[Count] | None = None,
    pixels: bool = False,
    images: str = "val",
    count: Count = 16,
    least_agreement: Share = 0.999,
    most_points: NotNegative = 0.1,
    gated: bool = False,
) -> dict[str, Any]:
    """Write the model that `resume` names to `out_dir`/model.pt2, once it is proven, and export_report.json beside it.

    Arguments are those of `export_onnx`.

    Raises:
        UserError: it cannot be exported, or what was written answers otherwise than the model; the file is not kept.
    """
    wish, limits = Wish(dynamic, check_size(size), pixels), Limits(least_agreement, most_points)
    with prepared(cfg, out_dir, wish, images=images, count=count, gated=gated) as ready:
        file = ready.folder / NAME
        about = json.dumps({"graph": ready.record.plain(), **ready.facts.description()}, allow_nan=False)
        torch.export.save(trace(ready.reference.segmenter, ready.record), file, extra_files={f"{KEY}.json": about})
        report = keep_if_proven(
            ready, "program", [file], out_dir, limits, lambda: "the traced program: export=onnx names the layer"
        )
    print(f'use: import torch; outputs = torch.export.load("{out_dir / NAME}").module()(images)')
    return {"path": str(out_dir / NAME), "agreement": report["agreement"]}
