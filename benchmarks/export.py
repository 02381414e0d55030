"""Exported files against PyTorch: agreement, size and latency of a trained model, each measured in the same run.

    python benchmarks/export.py RUN [--images val] [--count 16] [--threads 1]

RUN is a run folder of mode=train or a checkpoint; --images as `export.images`. Each export is proven by its gate
(`exporting/`), whose report is what is printed: latency is that of one picture from its array to class ids, of PyTorch
eager and of the exported file in turns, picture by picture; the ratio is below 1 where the file is faster.
"""

import argparse
import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path

import torch

from dinoseg.errors import UserError
from dinoseg.exporting.export import REPORT
from dinoseg.exporting.onnx_export import export_onnx
from dinoseg.exporting.program import export_program
from dinoseg.runs.resume import alone
from dinoseg.training import checkpoint

CASES = {
    "ONNX float32": (export_onnx, {}),
    "ONNX float32, one size": (export_onnx, {"dynamic": False}),
    "ONNX float16 weights": (export_onnx, {"precision": "float16"}),
    "ONNX int8 weights": (export_onnx, {"precision": "int8"}),
    "torch.export program": (export_program, {}),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--images", default="val")
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    words = parser.parse_args()
    torch.set_num_threads(words.threads)
    file = checkpoint.find(words.run, "best")
    print("| export | kept | pixels that agree | mIoU, PyTorch / exported | MB | ms, PyTorch / exported | ratio |")
    print("|---|---|---|---|---|---|---|")
    for name, (export, options) in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            cfg = alone(file, checkpoint.describe(file), {"engine.device": "cpu"})
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    export(cfg, out_dir=Path(folder), images=words.images, count=words.count, **options)
            except UserError as refusal:
                print(f"{name}: {refusal}", file=sys.stderr)
            report = json.loads(Path(folder, REPORT).read_text())
        miou, ms = report["miou"], report["latency_ms"]
        print(
            f"| {name} | {'yes' if report['proven'] else 'no'} | {report['agreement']:.3%} | {100 * miou['torch']:.2f} "
            f"/ {100 * miou['exported']:.2f} | {report['bytes'] / 1e6:.2f} | {ms['torch']:.0f} / {ms['exported']:.0f} "
            f"| {ms['ratio']:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
