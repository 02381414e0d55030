"""Print how many images a second are trained on, against LightlyTrain and a plain script on timm, side by side.

`python benchmarks/end_to_end.py [--camvid DIR] [--epochs 10] [--images 32] [--only NAME ...] [--threads 1]`: a ViT-S/14
of random weights in its published shape, crops of 350 x 476 of the first images of CamVid (without it: of drawn ones of
its size), batches of 16, a linear head on the last block and cross-entropy at full resolution, in float32 and bfloat16;
and a backbone that is trained as well, for `--live` steps. Each way is a process of its own that reads, augments, and
trains with AdamW; no loading processes; no validation before the last step. Of the steps after the first, which waits
for imports, the least counts, in processor seconds, since others may be at work; wall clock beside it: once others are
gone that is the figure. With the cache the least step is one of the second epoch or later; the sum has the first too.

LightlyTrain freezes the whole backbone for its linear models, as it does by itself: ViT-S/14 in eval mode without a
gradient, the same forward pass as ours; its head is one linear layer, ours and the plain script's has a BatchNorm
before it. It has no LoRA: where the backbone is trained, it trains all of it, which is more work, and its row says so.
The other two have LoRA of rank 8 on queries, keys and values, without dropout; ours on each, timm's on all in one.
It is measured where it is installed (`pip install lightly-train`); otherwise its rows say so.
"""

import argparse
import importlib.util
import json
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rows import Row, machine, tell
from step_times import Times, step_times, told
from step_times import by_dinoseg as command
from tabulate import tabulate

from dinoseg.utils.images import write_png

PATCH, CAMVID = 14, (360, 480)
CLASSES = "sky building pole road pavement tree sign fence car pedestrian bicyclist".split()
CACHED = "dinoseg from its cache"
WAYS = {  # what is trained and in which precision, by whom
    f"{by}, {trained}, {precision}": (by, trained, precision)
    for trained, precision in (("head", "fp32"), ("head", "bf16"), ("backbone", "fp32"), ("backbone", "bf16"))
    for by in ("LightlyTrain", "timm", "dinoseg", CACHED)
    if (by, trained) != (CACHED, "backbone")
}
NEEDED = {("dinoseg", "fp32"): 2.0, ("dinoseg", "bf16"): 4.0, (CACHED, "fp32"): 20.0, (CACHED, "bf16"): 20.0}
WORK = {"LightlyTrain": "all of it", "timm": "LoRA of rank 8", "dinoseg": "LoRA of rank 8"}
MISSING = "LightlyTrain is not installed: pip install lightly-train, in an environment of its own"
HEADERS = ("by", "trained", "precision", "processor s a step", "wall s", "images / processor s", "images / wall s",
           "all steps, processor s", "wall s")  # fmt: skip
Key = tuple[str, str, str]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--camvid", type=Path, help="train/images and train/masks; without it images are drawn")
    parser.add_argument("--only", nargs="+", choices=WAYS, default=list(WAYS), metavar="NAME", help="; ".join(WAYS))
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--live", type=int, help="steps where nothing is cached; all of the epochs by default")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, nargs=2, default=(350, 476))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        print(json.dumps(measured(args)))
        return 0
    found: dict[str, list[Times]] = {way: [] for way in args.only if present(WAYS[way][0])}
    with tempfile.TemporaryDirectory() as folder:
        few(args.camvid, Path(folder) / "data", args.images)
        for _ in range(args.rounds):
            for way, rounds in found.items():
                with tempfile.TemporaryDirectory(dir=folder) as where:
                    words = [__file__, *sys.argv[1:], "--camvid", f"{folder}/data", "--way", way]
                    rounds.append(told(words, where, args.threads, way))
    best = {WAYS[way]: summed(rounds) for way, rounds in found.items()}
    rows = compared(best, [WAYS[way] for way in args.only])
    print(tabulate([line(key, best, args.batch) for key in best], HEADERS, floatfmt=".3g"))
    print(
        f"\n{args.images} images of {CAMVID[0]} x {CAMVID[1]}, {args.epochs} epochs, {args.live or 'all'} live steps, "
    )
    print(
        f"batches of {args.batch}, crops of {args.size}, least of {args.rounds} rounds, {args.threads} threads, ",
        end="",
    )
    print(machine(("torch", "timm", "peft", *["lightly-train"] * present("LightlyTrain"))))
    for row in rows:
        if row.skipped:
            print(f"left out: {row.what}: {row.skipped}")
    tell(*rows)
    return int(any(row.missed for row in rows))


def present(by: str) -> bool:
    return by != "LightlyTrain" or importlib.util.find_spec("lightly_train") is not None


def summed(rounds: list[Times]) -> tuple[float, float, float, float]:
    """Return processor and wall seconds of the least step, and of all steps in the least round."""
    steps = [times for one in rounds for times in one]
    sums = [[sum(part) for part in zip(*one, strict=True)] for one in rounds]
    busy, wall = (min(part) for part in zip(*steps, strict=True))
    all_busy, all_wall = (min(part) for part in zip(*sums, strict=True))
    return busy, wall, all_busy, all_wall


def line(key: Key, best: dict[Key, tuple[float, ...]], batch: int) -> list[object]:
    by, trained, precision = key
    work = "head" if trained == "head" else f"head and backbone: {WORK[by]}"
    busy, wall, *sums = best[key]
    return [by, work, precision, busy, wall, batch / busy, batch / wall, *sums]


def compared(best: dict[Key, tuple[float, ...]], asked: list[Key]) -> list[Row]:
    """Return the ratios of others' processor seconds to ours."""
    rows = []
    for ours, trained, precision in asked:
        for by in ("LightlyTrain", "timm") if ours.startswith("dinoseg") else ():
            if (by, trained, precision) not in asked:
                continue
            how = "live" if ours == "dinoseg" else "from the cache, from the second epoch on"
            what = f"frozen ViT-S/14, linear head, {how}" if trained == "head" else "ViT-S/14 by LoRA, linear head"
            what = f"{what}, {precision}, processor time of a step"
            reference = by if trained == "head" else f"{by}, {WORK[by]}"
            needed = NEEDED.get((ours, precision)) if by == "LightlyTrain" and trained == "head" else None
            theirs = best.get((by, trained, precision))
            if theirs is None:
                rows.append(Row(what, reference, None, needed, MISSING))
            else:
                rows.append(Row(what, reference, theirs[0] / best[ours, trained, precision][0], needed))
    return rows


def few(root: Path | None, folder: Path, images: int) -> None:
    """Link the first training images of a data set and their masks, and one validation image; or draw as many."""
    draw = np.random.default_rng(0)
    for split, count in (("train", images), ("val", 1)):
        for part in ("images", "masks"):
            (folder / split / part).mkdir(parents=True)
            for path in sorted((root.resolve() / split / part).iterdir())[:count] if root else ():
                (folder / split / part / path.name).symlink_to(path)
        for number in range(0 if root else count):
            blocks = draw.integers(0, len(CLASSES) + 1, (CAMVID[0] // 8, CAMVID[1] // 8)).astype(np.uint8)
            pixels = draw.integers(0, 256, (*CAMVID, 3)).astype(np.uint8)
            write_png(folder / split / "images" / f"{number}.png", pixels)
            write_png(folder / split / "masks" / f"{number}.png", blocks.repeat(8, 0).repeat(8, 1))


def measured(args: argparse.Namespace) -> Times:
    """Return the times of the steps of one way, which runs here."""
    import torch

    torch.set_num_threads(args.threads)
    by, trained, precision = WAYS[args.way]
    epochs = args.epochs * max(1, args.images // args.batch)
    steps = epochs if by == CACHED or args.live is None else args.live
    return step_times(partial(BY[by], args, steps, trained, precision))


def by_dinoseg(args: argparse.Namespace, steps: int, trained: str, precision: str, cache: str = "off") -> None:
    lora = ("adapter=lora", "adapter.rank=8", "adapter.dropout=0", 'adapter.targets="[qkv]_proj"')
    adapter = ("adapter=frozen",) if trained == "head" else lora
    words = [
        *("data=camvid", f"data.root={args.camvid}", "backbone=dinov2_vits14", *adapter, "head=linear"),
        *("backbone.weights=random", f"resolution.crop={list(args.size)}".replace(" ", ""), "data.augment.scale=[1,1]"),
        *(f"data.batch_size={args.batch}", f"trainer.steps={steps}", f"trainer.val_every={steps}"),
        *("engine=cpu", "engine.workers=0", f"engine.precision={precision}", "data.workers=1", "loss.weights=none"),
        *(f"engine.cache={cache}", "data.views=1", "trainer.log_every=100"),
        *("mode.metrics_only=true", "mode.report=false", "mode.pictures=0", "hydra.run.dir=run"),
    ]
    command(words)


def by_timm(args: argparse.Namespace, steps: int, trained: str, precision: str) -> None:
    from plain_timm import main as plain

    options = ["--lora"] * (trained == "backbone") + ["--bf16"] * (precision == "bf16")
    options += ["--size", *map(str, args.size), "--steps", str(steps), "--batch", str(args.batch)]
    sys.argv = ["plain_timm", str(args.camvid / "train"), *options]
    plain()


def by_lightly(args: argparse.Namespace, steps: int, trained: str, precision: str) -> None:
    import lightly_train
    from lightly_train._models import package_helpers

    pretrained = package_helpers.get_wrapped_model

    def untrained(**options: Any) -> Any:
        return pretrained(**{**options, "load_weights": False})

    package_helpers.get_wrapped_model = untrained
    sides = {side: {part: str(args.camvid / side / part) for part in ("images", "masks")} for side in ("train", "val")}
    lightly_train.train_semantic_segmentation(
        out="run",
        data={**sides, "classes": dict(enumerate(CLASSES)), "ignore_classes": [11]},
        model="dinov2/vits14-linear",
        steps=steps,
        batch_size=args.batch,
        gradient_accumulation_steps=1,  # auto accumulates to 16 images a step, whatever the batch
        num_workers=0,
        accelerator="cpu",
        precision="bf16-mixed" if precision == "bf16" else "32-true",
        model_args={"backbone_freeze": trained == "head"},
        transform_args={"image_size": tuple(args.size)},
        logger_args={"val_every_num_steps": steps, "log_every_num_steps": 100},
        save_checkpoint_args={"save_every_num_steps": 10**9},
    )


BY: dict[str, Callable[[argparse.Namespace, int, str, str], None]] = {
    "LightlyTrain": by_lightly,
    "timm": by_timm,
    "dinoseg": by_dinoseg,
    CACHED: partial(by_dinoseg, cache="disk"),
}


if __name__ == "__main__":
    sys.exit(main())
