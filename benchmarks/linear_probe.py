"""DINOv3's linear probe with official settings: compare dinoseg with a script in plain PyTorch, on real data.

    python benchmarks/linear_probe.py WEIGHTS DATA [--sets camvid idd_lite] [--steps 300] [--seeds 3]

WEIGHTS is a safetensors file of timm's vit_tiny_patch16_224, DATA a folder with camvid and idd20k_lite. Prints the mIoU
of each run, and the difference of the means with its 95 % interval (Welch).
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from scipy import stats

REFERENCE = Path(__file__).with_name("linear_probe_reference.py")
SETS = {"camvid": "camvid", "idd_lite": "idd20k_lite"}


def reference(weights: str, root: Path, name: str, seed: int, steps: int) -> float:
    command = [sys.executable, REFERENCE, weights, root, name, str(seed), str(steps)]
    done = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def dinoseg(weights: str, root: Path, name: str, seed: int, steps: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        words = ["mode=train", "hparam=linear_ade20k", f"data={name}", f"data.root={root}", f"seed={seed}"]
        words += ["backbone=timm", "backbone.name=vit_tiny_patch16_224", f"backbone.weights={weights}"]
        words += ["backbone.mean=[0.5,0.5,0.5]", "backbone.std=[0.5,0.5,0.5]", "data.augment.fill=[128,128,128]"]
        words += ["resolution.crop=[224,224]", "inference.size=224", "inference.stride=149", "inference.shortest=224"]
        words += [
            f"trainer.steps={steps}",
            f"trainer.val_every={steps}",
            "data.batch_size=8",
            f"hydra.run.dir={folder}",
        ]
        subprocess.run([sys.executable, "-m", "dinoseg", *words], check=True, capture_output=True)
        rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text("utf-8").splitlines()]
    return 100 * next(row["val/miou"] for row in reversed(rows) if "val/miou" in row)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("weights")
    parser.add_argument("data", type=Path)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    if given.seeds < 2:
        parser.error("--seeds: give at least 2, for an interval")
    for name in given.sets:
        found: dict[str, list[float]] = {"dinoseg": [], "reference": []}
        for seed in range(given.seeds):
            for run in (dinoseg, reference):
                score = run(given.weights, given.data / SETS[name], name, seed, given.steps)
                print(f"{name:9} {run.__name__:9} seed {seed}: {score:.2f}", flush=True)
                found[run.__name__].append(score)
        ours, theirs = map(np.array, found.values())
        print(f"{name:9} dinoseg {ours.mean():.2f} +- {ours.std(ddof=1):.2f}, ", end="")
        print(f"reference {theirs.mean():.2f} +- {theirs.std(ddof=1):.2f}")
        low, high = stats.ttest_ind(ours, theirs, equal_var=False).confidence_interval()
        print(f"{name:9} difference {ours.mean() - theirs.mean():+.2f}, 95 % {low:+.2f} .. {high:+.2f}", flush=True)


if __name__ == "__main__":
    main()
