"""Print what a training step of a head costs against one of `head=multiscale`, on a frozen backbone, in processor s.

`python benchmarks/head_step.py [--heads detail "detail head.blocks=1"] [--steps 8] [--backbone KEY=VALUE ...]
[--precision bf16]`: random weights, batches of 2 crops of 352 x 480 of drawn noise in 11 classes, `loss=ce_dice`, one
thread, float32 unless said otherwise; once with the backbone live and once from kept features (`engine.cache=memory`).
Each training is a process of its own; of its steps, and of `--repeats` in turns, the least counts.
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
REFERENCE = "multiscale"
CACHES = {"off": "backbone live", "memory": "kept features"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--heads", nargs="+", default=["detail"])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--backbone", nargs="+", default=["backbone=dinov3_vits16"])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    given = parser.parse_args()
    least = {(cache, head): float("inf") for cache in CACHES for head in (REFERENCE, *given.heads)}
    with tempfile.TemporaryDirectory() as folder:
        draw_data(Path(folder) / "data")
        for cache, head in [*least] * given.repeats:
            words = [*WORDS, f"engine.precision={given.precision}", *given.backbone, *f"head={head}".split()]
            words += [f"engine.cache={cache}", "loss=ce_dice", "data.views=1"]
            with tempfile.TemporaryDirectory(dir=folder) as where:
                command = [str(HERE / "step_times.py"), *words, f"trainer.steps={given.steps}"]
                times = told(command, where, 1, f"{head}, {CACHES[cache]}")
            least[cache, head] = min(least[cache, head], *(busy for busy, _ in times))
    ratios = {(cache, head): least[cache, REFERENCE] / least[cache, head] for cache, head in least if head != REFERENCE}
    rows = [(CACHES[cache], head, busy, busy / least[cache, REFERENCE]) for (cache, head), busy in least.items()]
    print(tabulate(rows, ("", "head", "s a step", f"times {REFERENCE}"), floatfmt=".3g"))
    print(f"{' '.join(given.backbone)}, one thread, {given.precision}; {machine()}")
    tell(
        *(
            Row(f"{head}, {CACHES[cache]}, {given.precision}, time a step", REFERENCE, ratio)
            for (cache, head), ratio in ratios.items()
        )
    )


def draw_data(root: Path) -> None:
    """Write a folder data set of noise."""
    draw = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 1)):
        for number in range(count):
            write_png(root / split / "images" / f"{number}.png", draw.integers(0, 256, (*SIZE, 3)).astype(np.uint8))
            write_png(root / split / "masks" / f"{number}.png", draw.integers(0, CLASSES, SIZE).astype(np.uint8))


if __name__ == "__main__":
    main()
