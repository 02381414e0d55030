"""Print how many images a second are trained on, against LightlyTrain and a plain script on timm, side by side.

`python benchmarks/end_to_end.py DATA/camvid [--only NAME ...] [--steps 4] [--rounds 1] [--threads 1]`: a ViT-S/14 of
random weights in its published shape, crops of 350 x 476 of the first images of CamVid, batches of 16, a linear head on
the last block and cross-entropy at full resolution, in float32 and bfloat16; and a backbone that is trained as well.
Each way is a process of its own that reads, augments, and trains with AdamW; no loading processes, no validation. A
step's time is the least between two steps of the optimizer, of all rounds in turns: processor seconds, since others
may be at work, and wall clock beside it. The first step, which waits for imports, is none of them.

LightlyTrain freezes the whole backbone here, as its linear models do by themselves, and has no LoRA: where the backbone
is trained, it trains all of it. It is left out where it is not installed (`pip install lightly-train`).
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rows import Row, machine, tell
from tabulate import tabulate
from torch.optim.optimizer import register_optimizer_step_post_hook

SIZE, BATCH = (350, 476), 16
CLASSES = "sky building pole road pavement tree sign fence car pedestrian bicyclist".split()
WAYS = {  # what is trained and in which precision, by whom
    f"{by}, {trained}, {precision}": (by, trained, precision)
    for trained, precision in (("head", "fp32"), ("head", "bf16"), ("backbone", "fp32"))
    for by in ("LightlyTrain", "timm", "dinoseg", "dinoseg from its cache")
    if (by, trained) != ("dinoseg from its cache", "backbone")
}
NEEDED = {
    ("dinoseg", "fp32"): 2.0,
    ("dinoseg", "bf16"): 4.0,
    ("dinoseg from its cache", "fp32"): 20.0,
}  # by LightlyTrain
WORK = {"LightlyTrain": "all of it", "timm": "LoRA of rank 8", "dinoseg": "LoRA of rank 8"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", type=Path, help="CamVid: train/images and train/masks")
    parser.add_argument("--only", nargs="+", choices=WAYS, default=list(WAYS), metavar="NAME", help="; ".join(WAYS))
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        print(json.dumps(measured(args)))
        return 0
    ways = args.only
    if importlib.util.find_spec("lightly_train") is None:
        ways = [way for way in ways if WAYS[way][0] != "LightlyTrain"]
        print("LightlyTrain is not installed here, and left out: pip install lightly-train")
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as folder:
        few(args.root.resolve(), Path(folder) / "data", args.images)
        for _ in range(args.rounds):
            for way in ways:
                found[way] += run(way, folder, args)
    best = {WAYS[way]: tuple(map(min, zip(*seconds, strict=True))) for way, seconds in found.items()}
    rows = told(best)
    print(tabulate([line(key, best) for key in best], HEADERS, floatfmt=".3g"))
    print(f"\n{args.images} images, {args.steps - 1} steps of {BATCH} in each of {args.rounds} rounds, ", end="")
    print(f"{args.threads} threads, no loading process; {machine(('torch', 'timm', 'peft', *LIGHTLY))}")
    tell(*rows)
    return int(any(row.needed is not None and row.ratio < row.needed for row in rows))


HEADERS = ("by", "trained", "precision", "processor s a step", "wall s", "images / processor s", "images / wall s")
LIGHTLY = ("lightly-train",) if importlib.util.find_spec("lightly_train") else ()


def line(key: tuple[str, str, str], best: dict[Any, Any]) -> list[object]:
    by, trained, precision = key
    work = "head" if trained == "head" else f"head and backbone: {WORK[by]}"
    return [by, work, precision, *best[key], *(BATCH / seconds for seconds in best[key])]


def told(best: dict[Any, Any]) -> list[Row]:
    """Return the ratios of others' processor seconds to ours."""
    rows = []
    for ours, trained, precision in best:
        for by in ("LightlyTrain", "timm") if ours.startswith("dinoseg") else ():
            if (by, trained, precision) in best:
                how = "live" if ours == "dinoseg" else "from the cache"
                what = f"frozen ViT-S/14, linear head, {how}" if trained == "head" else "ViT-S/14 by LoRA, linear head"
                reference = by if trained == "head" else f"{by}, {WORK[by]}"
                needed = NEEDED.get((ours, precision)) if by == "LightlyTrain" and trained == "head" else None
                ratio = best[by, trained, precision][0] / best[ours, trained, precision][0]
                rows.append(Row(f"{what}, {precision}, processor time of a step", reference, ratio, needed))
    return rows


def run(way: str, folder: str, args: argparse.Namespace) -> list[tuple[float, float]]:
    """Return processor and wall seconds of each step of a way but the first, in a process of its own."""
    command = [sys.executable, __file__, f"{folder}/data", "--way", way, "--steps", str(args.steps)]
    env = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "LIGHTLY_TRAIN_EVENTS_DISABLED": "1"}
    env |= {"PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"}
    command += ["--threads", str(args.threads)]
    with tempfile.TemporaryDirectory(dir=folder) as where:
        done = subprocess.run(command, cwd=where, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{way} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    print(f"{way}: {done.stdout.splitlines()[-1]}", file=sys.stderr, flush=True)
    return [(busy, wall) for busy, wall in json.loads(done.stdout.splitlines()[-1])]


def few(root: Path, folder: Path, images: int) -> None:
    """Link the first training images of a data set and their masks, and one validation image."""
    for split, count in (("train", images), ("val", 1)):
        for part in ("images", "masks"):
            (folder / split / part).mkdir(parents=True)
            for path in sorted((root / split / part).iterdir())[:count]:
                (folder / split / part / path.name).symlink_to(path)


def measured(args: argparse.Namespace) -> list[tuple[float, float]]:
    """Return processor and wall seconds between the steps of one way, which runs here."""
    torch.set_num_threads(args.threads)
    times: list[tuple[float, float]] = []
    register_optimizer_step_post_hook(lambda *_: times.append((time.process_time(), time.perf_counter())))
    by, trained, precision = WAYS[args.way]
    BY[by](args.root, args.steps, trained, precision)
    pairs = zip(times[:-1], times[1:], strict=True)
    return [(later[0] - sooner[0], later[1] - sooner[1]) for sooner, later in pairs]


def by_dinoseg(root: Path, steps: int, trained: str, precision: str, cache: str = "off") -> None:
    from dinoseg.__main__ import main as command

    adapter = "adapter=frozen" if trained == "head" else "adapter=lora"
    sys.argv = [
        *(
            "dinoseg",
            "mode=train",
            "data=camvid",
            f"data.root={root}",
            "backbone=dinov2_vits14",
            adapter,
            "head=linear",
        ),
        *("backbone.weights=random", f"resolution.crop=[{SIZE[0]},{SIZE[1]}]", "data.augment.scale=[1,1]"),
        *(f"data.batch_size={BATCH}", f"trainer.steps={steps}", f"trainer.val_every={steps}", "trainer.log_every=100"),
        *("engine=cpu", "engine.workers=0", f"engine.precision={precision}", "data.workers=1", "loss.weights=none"),
        *(f"engine.cache={cache}", "data.views=1"),
        *("mode.metrics_only=true", "mode.report=false", "mode.pictures=0", "hydra.run.dir=run"),
    ]
    command()


def by_timm(root: Path, steps: int, trained: str, precision: str) -> None:
    from plain_timm import main as plain

    options = ["--lora"] * (trained == "backbone") + ["--bf16"] * (precision == "bf16")
    sys.argv = ["plain_timm", str(root / "train"), "--steps", str(steps), "--batch", str(BATCH), *options]
    plain()


def by_lightly(root: Path, steps: int, trained: str, precision: str) -> None:
    import lightly_train
    from lightly_train._models import package_helpers

    pretrained = package_helpers.get_wrapped_model

    def untrained(**options: Any) -> Any:
        return pretrained(**{**options, "load_weights": False})

    package_helpers.get_wrapped_model = untrained
    sides = {side: {part: str(root / side / part) for part in ("images", "masks")} for side in ("train", "val")}
    lightly_train.train_semantic_segmentation(
        out="run",
        data={**sides, "classes": dict(enumerate(CLASSES)), "ignore_classes": [11]},
        model="dinov2/vits14-linear",
        steps=steps,
        batch_size=BATCH,
        num_workers=0,
        accelerator="cpu",
        precision="bf16-mixed" if precision == "bf16" else "32-true",
        model_args={"backbone_freeze": trained == "head"},
        transform_args={"image_size": SIZE},
        logger_args={"val_every_num_steps": steps, "log_every_num_steps": 100},
        save_checkpoint_args={"save_every_num_steps": 10**9},
    )


BY: dict[str, Callable[[Path, int, str, str], None]] = {
    "LightlyTrain": by_lightly,
    "timm": by_timm,
    "dinoseg": by_dinoseg,
    "dinoseg from its cache": partial(by_dinoseg, cache="disk"),
}


if __name__ == "__main__":
    sys.exit(main())
