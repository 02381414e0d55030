"""export=onnx: a trained model as an ONNX file, verified on real images."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from dinoseg.checkpoints.source import ModelSource
from dinoseg.extensions.export import onnx_file
from dinoseg.extensions.export.export import prepare_model, store_if_verified
from dinoseg.extensions.export.graph import trace
from dinoseg.extensions.export.onnx_model import ONNX_FILE, load_onnx
from dinoseg.extensions.export.options import GraphOptions
from dinoseg.utils.ranges import Count


@dataclass(frozen=True, kw_only=True)
class OnnxExport(GraphOptions):
    """ONNX export and its options; calling it writes the file.

    Attributes:
        opset: version of ONNX's operators, at least 18.
        precision: type of the stored weights: float32, float16, or int8 with one scale per output channel. The graph
            computes in float32.

    Raises:
        UserError: if the opset is unsupported, or as `GraphOptions`.
    """

    opset: Count = 18
    precision: Literal["float32", "float16", "int8"] = "float32"

    def __post_init__(self) -> None:
        """Refuse options that this machine cannot fulfil."""
        super().__post_init__()
        onnx_file.check_opset(self.opset)

    def __call__(self, source: ModelSource, *, out_dir: Path) -> dict[str, Any]:
        """Write a trained model to `out_dir`/model.onnx once it is verified, with its report next to it.

        Args:
            source: the trained model.
            out_dir: the run folder.

        Raises:
            UserError: if the model cannot be exported, or the file disagrees with it; no model file is left then.
        """
        with prepare_model(source, out_dir, self, opset=self.opset, precision=self.precision) as ready:
            model = onnx_file.to_onnx(trace(ready.model, ready.record), ready.record)
            onnx_file.finish(model, ready.record, ready.facts.description())
            files = onnx_file.write(model, ready.folder / ONNX_FILE)
            runtime = load_onnx(files[-1], device="cpu", threads=torch.get_num_threads()).runtime
            report = store_if_verified(ready, runtime, files, out_dir, self)
        path = out_dir / ONNX_FILE
        print(f'use: import dinoseg; model = dinoseg.load("{path}"); out = model.predict("{ready.facts.example}")')
        return {"path": str(path), "agreement": report["agreement"]}
