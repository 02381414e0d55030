"""Exported files against PyTorch: agreement, size and latency of a trained model, each measured in the same run.

    python benchmarks/export.py RUN [--count 16] [KEY=VALUE ...]

RUN is a run folder of mode=train or a checkpoint; further words go to `mode=export`. Each export is proven by its gate
(`exporting/`), whose report is what is printed: latency is that of one picture from its array to class ids, of PyTorch
eager and of the exported file in turns, picture by picture; the ratio is below 1 where the file is faster.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

CASES = {
    "ONNX float32": ("export=onnx",),
    "ONNX float32, one size": ("export=onnx", "export.dynamic=false"),
    "ONNX float16 weights": ("export=onnx", "export.precision=float16"),
    "ONNX int8 weights": ("export=onnx", "export.precision=int8"),
    "torch.export program": ("export=program",),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--count", type=int, default=16)
    known, words = parser.parse_known_args()
    print("| export | kept | pixels that agree | mIoU, PyTorch / exported | MB | ms, PyTorch / exported | ratio |")
    print("|---|---|---|---|---|---|---|")
    for name, case in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            given = ["mode=export", f"resume={known.run}", "engine=cpu", f"export.count={known.count}", *case, *words]
            command = [sys.executable, "-m", "dinoseg", *given, f"hydra.run.dir={folder}/out"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            path = Path(folder, "out/export_report.json")
            if not path.is_file():
                sys.exit(f"{name}: {done.stderr}")
            report = json.loads(path.read_text())
        miou, ms = report["miou"], report["latency_ms"]
        print(
            f"| {name} | {'yes' if report['proven'] else 'no'} | {report['agreement']:.3%} | {100 * miou['torch']:.2f} "
            f"/ {100 * miou['exported']:.2f} | {report['bytes'] / 1e6:.2f} | {ms['torch']:.1f} / {ms['exported']:.1f} "
            f"| {ms['ratio']:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
