"""export=program: a trained model as a program of torch.export, which runs without dinoseg's code."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dinoseg.checkpoints.source import ModelSource
from dinoseg.extensions.export.export import prepare_model, store_if_verified
from dinoseg.extensions.export.graph import trace
from dinoseg.extensions.export.onnx_pictures import GraphRuntime
from dinoseg.extensions.export.onnx_record import KEY, GraphRecord
from dinoseg.extensions.export.options import GraphOptions

PROGRAM_FILE = "model.pt2"


@dataclass(frozen=True, kw_only=True)
class ProgramExport(GraphOptions):
    """Export to a program of torch.export and its options; calling it writes the file."""

    def __call__(self, source: ModelSource, *, out_dir: Path) -> dict[str, Any]:
        """Write a trained model to `out_dir`/model.pt2 once it is verified, with its report next to it.

        Args:
            source: the trained model.
            out_dir: the run folder.

        Raises:
            UserError: if the model cannot be exported, or the file disagrees with it; no model file is left then.
        """
        with prepare_model(source, out_dir, self) as ready:
            file = ready.folder / PROGRAM_FILE
            about = json.dumps({"graph": ready.record.plain(), **ready.facts.description()}, allow_nan=False)
            torch.export.save(trace(ready.model, ready.record), file, extra_files={f"{KEY}.json": about})
            report = store_if_verified(ready, open_program(file, ready.record), [file], out_dir, self)
        print(f'use: import torch; outputs = torch.export.load("{out_dir / PROGRAM_FILE}").module()(images)')
        return {"path": str(out_dir / PROGRAM_FILE), "agreement": report["agreement"]}


def open_program(path: Path, record: GraphRecord) -> GraphRuntime:
    """Return the runtime of a program that was just written."""
    module = torch.export.load(path).module()

    @torch.inference_mode()
    def compute(pixels: np.ndarray) -> list[np.ndarray]:
        return [part.numpy() for part in module(torch.from_numpy(pixels))]

    return GraphRuntime(compute, record)
