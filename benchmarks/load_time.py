"""Time `dinoseg.load` against the imports that a model needs, each in a fresh process, in turns.

`python benchmarks/load_time.py FILE [FILE ...] [--repeats 5]`: each FILE is what `mode=export` wrote, a checkpoint or a
run folder. The reference imports the libraries that the model is made of and nothing else: torch, with timm or the
model class of transformers, and peft for LoRA; onnxruntime for an ONNX file. Printed are the least wall-clock and CPU
seconds of the repeats and their ratios, load over imports; at most 1.2 is promised.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from rows import Row, machine, tell
from tabulate import tabulate

from dinoseg.training import checkpoint

MAX = 1.2
TRANSFORMERS = (
    "from transformers import AutoModel; from transformers.models.dinov3_vit.modeling_dinov3_vit import DINOv3ViTModel"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    rows = []
    for file in args.files:
        imports = imports_of(file)
        codes = {"imports": imports, "load": f"import dinoseg; dinoseg.load({str(file)!r}, device='cpu')"}
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in codes}
        for _ in range(args.repeats):
            for name, code in codes.items():
                seconds[name].append(timed(code))
        least = {name: [min(each) for each in zip(*found, strict=True)] for name, found in seconds.items()}
        wall, cpu = (load / alone for load, alone in zip(least["load"], least["imports"], strict=True))
        columns = [f"{value:.2f}" for pair in zip(least["imports"], least["load"], strict=True) for value in pair]
        rows.append([file.name, imports.split(";")[0], *columns, f"{wall:.2f}", f"{cpu:.2f}"])
        tell(Row(f"dinoseg.load of {file.name}, time", imports, 1 / wall, 1 / MAX))
    headers = ("file", "imports", "imports s", "load s", "imports CPU s", "load CPU s", "ratio", "CPU ratio")
    print(tabulate(rows, headers=headers))
    print(f"\n{machine()}")


def imports_of(file: Path) -> str:
    """Return the imports that a model of this file needs."""
    if file.suffix == ".onnx":
        return "import numpy, onnxruntime"
    targets = checkpoint.describe(checkpoint.find(file, "best"))["targets"]
    module = targets["backbone"].split(".")[-2]
    libraries = {"timm_backbone": "; import timm", "rgb": ""}.get(module, f"; {TRANSFORMERS}")
    return f"import torch{libraries}" + ("; import peft" if targets["adapter"].endswith(".Lora") else "")


def timed(code: str) -> tuple[float, float]:
    """Return the wall-clock and the CPU seconds that code takes in a fresh process, which has started."""
    clocks = "(time.perf_counter(), time.process_time())"
    whole = f"import time; began = {clocks}\n{code}\nprint(*(b - a for a, b in zip(began, {clocks})))"
    done = subprocess.run([sys.executable, "-c", whole], capture_output=True, text=True, env=os.environ, check=True)
    wall, cpu = map(float, done.stdout.split())
    return wall, cpu


if __name__ == "__main__":
    main()
