"""Print what several heads cost in one pass (`trainer=many_heads`) against runs of each alone, in processor seconds.

`python benchmarks/many_heads.py [--heads 4 8] [--steps 12] [--backbone dinov3_vits16]`: linear heads of several rates
on a frozen backbone of random weights, batches of 2 crops of 352 x 480 of drawn noise in 11 classes, one thread,
float32. Each command is a process of its own, run at two lengths: their difference is that of steps alone, without
start and validation. Ways take turns; the least of `--repeats` counts. The reference is as many runs of one head.
"""

import argparse
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tabulate import tabulate

from dinoseg.images import write_png

CLASSES, SIZE, SHORT = 11, (352, 480), 2
WORDS = (
    *("mode=train", "data=folder", "data.root=data", "data.batch_size=2", "adapter=frozen", "backbone.weights=random"),
    *("resolution.crop=[352,480]", "engine=cpu", "engine.workers=0", "engine.precision=fp32", "engine.cache=off"),
    *("trainer.val_every=1000", "loss.weights=none", "mode.metrics_only=true", "mode.report=false", "mode.pictures=0"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--heads", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--steps", type=int, default=12, help="steps that are timed")
    parser.add_argument("--backbone", default="dinov3_vits16")
    parser.add_argument("--repeats", type=int, default=2)
    given = parser.parse_args()
    rates = [f"{10 ** -(1 + number / 4):.3g}" for number in range(max(given.heads))]
    ways = {1: ["head=linear", f"optim.optimizer.lr={rates[0]}"]}
    ways |= {n: ["trainer=many_heads", "heads=[linear]", f"lrs=[{','.join(rates[:n])}]"] for n in given.heads if n > 1}
    least: dict[int, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        draw_data(Path(folder) / "data")
        for number in range(given.repeats):
            for heads, words in ways.items():
                words = [*words, f"backbone={given.backbone}"]
                seconds = [timed(folder, words, steps, f"{number}_{heads}") for steps in (SHORT, SHORT + given.steps)]
                step = (seconds[1] - seconds[0]) / given.steps
                least[heads] = min(step, least.get(heads, step))
    rows = [(n, n * least[1], least[n], n * least[1] / least[n]) for n in given.heads]
    print(tabulate(rows, ("heads", "s a step, one by one", "s a step, in one pass", "times faster"), floatfmt=".3g"))
    print(f"{given.backbone}; {platform.machine()}, torch {torch.__version__}, load {os.getloadavg()[0]:.1f}")


def draw_data(root: Path) -> None:
    """Write a folder data set of noise."""
    draw = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 1)):
        for number in range(count):
            write_png(root / split / "images" / f"{number}.png", draw.integers(0, 256, (*SIZE, 3)).astype(np.uint8))
            write_png(root / split / "masks" / f"{number}.png", draw.integers(0, CLASSES, SIZE).astype(np.uint8))


def timed(folder: str, words: Sequence[str], steps: int, name: str) -> float:
    """Return the processor seconds of a training of so many steps."""
    classes = f"data.classes=[{','.join(f'c{number}' for number in range(CLASSES))}]"
    command = [sys.executable, "-m", "dinoseg", *WORDS, classes, *words, f"trainer.steps={steps}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    log = Path(folder) / f"{name}_{steps}.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [*command, f"hydra.run.dir=runs/{name}_{steps}"], cwd=folder, env=environment, stdout=file, stderr=file
        )
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(log.read_text())
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()
