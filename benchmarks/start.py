"""Measure what a whole training of one step takes beside `import torch`, each in a fresh process, in turns.

`python benchmarks/start.py [--repeats 3]`: trains on drawn images of 64 x 64 pixels, with one validation, the final
evaluation, and the report. Printed are the least CPU seconds of the repeats, of the process and its children, and their
ratios, training over import. `MOST` bounds them, with room for the noise of a busy machine. Half of each is the import
of transformers' model, a tenth that of matplotlib for the curves at the end.
"""

import argparse
import os
import resource
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from rows import Row, machine, tell
from tabulate import tabulate

MOST = {
    "adapter=frozen head=linear": 5.5,
    "adapter=full head=eomt loss=mask_classification": 5.5,
    "adapter=lora head=linear": 6.0,
}
WORDS = (
    *("mode=train", "backbone=tiny_surgical", "data=folder", "data.root=data", "data.classes=[dark,bright]"),
    *("data.batch_size=2", "resolution.crop=[64,64]", "engine=cpu", "trainer.steps=1", "cache_dir=cache"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    commands = {"import torch": ["-c", "import torch"]}
    commands |= {words: ["-m", "dinoseg", *WORDS, *shlex.split(words)] for words in MOST}
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(args.repeats):
        for name, command in commands.items():
            with tempfile.TemporaryDirectory() as folder:
                draw_images(Path(folder) / "data")
                seconds[name].append(cpu_seconds(command, folder))
    least = {name: min(found) for name, found in seconds.items()}
    ratios = {name: value / least["import torch"] for name, value in least.items()}
    print(tabulate([[name, f"{least[name]:.2f}", f"{ratios[name]:.2f}"] for name in commands], ("", "CPU s", "ratio")))
    print(f"\n{machine()}")
    for words, most in MOST.items():
        tell(Row(f"training of one step, {words}, CPU time", "import torch", 1 / ratios[words], 1 / most))


def draw_images(root: Path) -> None:
    """Draw four images of noise for training and two for validation, brighter in their lower half, and their masks."""
    rng = np.random.default_rng(0)
    mask = np.repeat(np.array([0, 1], np.uint8), 32)[:, None].repeat(64, axis=1)
    for split, count in (("train", 4), ("val", 2)):
        for kind in ("images", "masks"):
            (root / split / kind).mkdir(parents=True)
        for number in range(count):
            image = mask[..., None] * 150 + rng.integers(0, 60, (64, 64, 3))
            Image.fromarray(image.astype(np.uint8)).save(root / split / "images" / f"{number}.png")
            Image.fromarray(mask).save(root / split / "masks" / f"{number}.png")


def cpu_seconds(command: Sequence[str], folder: str) -> float:
    """Return the user and system seconds of a Python process and its children; the program ends where it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # later repeats read the compiled package
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        sys.exit(f"{shlex.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()
