"""Print what several heads cost in one pass (`trainer=multi_head`) against runs of each alone, in processor seconds.

`python benchmarks/multi_head.py [--heads 4 8] [--steps 6] [--backbone dinov3_vits16]`: linear heads of several rates
on a frozen backbone of random weights, batches of 2 crops of 352 x 480 of drawn noise in 11 classes, one thread,
float32. Each training is a process of its own; of its steps, and of `--repeats` in turns, the least counts. The
reference is as many runs of one head.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
from rows import Row, machine, tell
from step_times import told
from tabulate import tabulate

from dinoseg.utils.images import write_png

HERE = Path(__file__).parent
CLASSES, SIZE = 11, (352, 480)
WORDS = (
    *("data=folder", "data.root=../data", "data.batch_size=2", "adapter=frozen", "backbone.weights=random"),
    *(f"data.classes=[{','.join(f'c{number}' for number in range(CLASSES))}]", "data.workers=1"),
    *("resolution.crop=[352,480]", "engine=cpu", "engine.workers=0", "engine.precision=fp32", "engine.cache=off"),
    *("trainer.val_every=1000", "loss.weights=none", "mode.metrics_only=true", "mode.report=false", "mode.pictures=0"),
    "hydra.run.dir=run",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--heads", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--backbone", default="dinov3_vits16")
    parser.add_argument("--repeats", type=int, default=2)
    given = parser.parse_args()
    rates = [f"{10 ** -(1 + number / 4):.3g}" for number in range(max(given.heads))]
    ways = {1: ["head=linear", f"optim.optimizer.lr={rates[0]}"]}
    ways |= {n: ["trainer=multi_head", "heads=[linear]", f"lrs=[{','.join(rates[:n])}]"] for n in given.heads if n > 1}
    least = dict.fromkeys(ways, float("inf"))
    with tempfile.TemporaryDirectory() as folder:
        draw_data(Path(folder) / "data")
        for _ in range(given.repeats):
            for heads, words in ways.items():
                words = [*WORDS, *words, f"backbone={given.backbone}", f"trainer.steps={given.steps}"]
                with tempfile.TemporaryDirectory(dir=folder) as where:
                    times = told([str(HERE / "step_times.py"), str(heads), *words], where, 1, f"{heads} heads")
                least[heads] = min(least[heads], *(busy for busy, _ in times))
    rows = [(n, n * least[1], least[n], n * least[1] / least[n]) for n in given.heads]
    print(tabulate(rows, ("heads", "s a step, one by one", "s a step, in one pass", "times faster"), floatfmt=".3g"))
    print(f"{given.backbone}, one thread; {machine()}")
    solo = "as many runs of one head"
    tell(*(Row(f"{n} linear heads in one pass, {given.backbone}, time a step", solo, ratio) for n, _, _, ratio in rows))


def draw_data(root: Path) -> None:
    """Write a folder data set of noise."""
    draw = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 1)):
        for number in range(count):
            write_png(root / split / "images" / f"{number}.png", draw.integers(0, 256, (*SIZE, 3)).astype(np.uint8))
            write_png(root / split / "masks" / f"{number}.png", draw.integers(0, CLASSES, SIZE).astype(np.uint8))


if __name__ == "__main__":
    main()
