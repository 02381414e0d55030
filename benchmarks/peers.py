"""Print mIoU against minutes of training: dinoseg beside LightlyTrain, segmentation_models_pytorch and plain timm.

`python benchmarks/peers.py DATA --weights FILE [--minutes 10] [--seeds 0 1 2] [--only NAME ...] [--threads 1]`: DATA
has train/ and val/ with images/ and masks/ of CamVid's numbers, FILE holds a ViT-Tiny/16 by timm's names, trained with
mean and deviation 0.5. Every way starts from it and is given the same minutes of a processor, in a process of its own:
a trial says how long a step takes, and then as many steps are taken as fit, with a schedule of that length. Reading,
augmenting, the features that are kept and the way's own last validation count; imports and predicting do not. Each way
predicts the validation images as PNGs of ids, and `mode=score` counts them all at full size.

LightlyTrain has no ViT-Tiny among its segmenters: its DINOv2 class is made in that shape and reads FILE by its own
`backbone_weights`; its warm-up of 500 and 1,000 steps is made the same share of these few, and batches are 4, not 16,
which gave it more (`--batch` for another). What is not installed is left out, and said.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import plain_segmenter
from rows import Row, machine, tell
from step_times import by_dinoseg
from tabulate import tabulate
from torch.optim.optimizer import register_optimizer_step_post_hook

from dinoseg.utils.images import write_png

VIT = "vit_tiny_patch16_224"
CLASSES = "sky building pole road pavement tree sign fence car pedestrian bicyclist".split()
SIZE = (352, 480)
FROZEN, TUNED = "dinoseg, frozen, detail head, kept features", "dinoseg, all trained, detail head"
EOMT, PROBE = "LightlyTrain, EoMT", "LightlyTrain, linear"
DPT, PLAIN = "segmentation_models_pytorch, DPT", "timm, linear, 60 lines"
NEEDS = {EOMT: "lightly_train", PROBE: "lightly_train", DPT: "segmentation_models_pytorch"}
THIN = ("pole", "sign")
TRIAL = {FROZEN: 400}  # steps of the trial: until all features are kept
HEADERS = ("way", "seed", "steps", "batch", "processor minutes", "wall minutes", "mIoU", *THIN)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", choices=WAYS, default=list(WAYS), metavar="NAME", help="; ".join(WAYS))
    parser.add_argument("--batch", type=int, default=4, help="of the others; dinoseg's is its recipe's")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.data, args.weights = args.data.resolve(), args.weights.resolve()
    if args.way:
        print(json.dumps(trained(args)))
        return 0
    lines, scores = [], {}
    for way in args.only:
        if way in NEEDS and importlib.util.find_spec(NEEDS[way]) is None:
            print(f"left out: {way}: {NEEDS[way]} is not installed")
            continue
        steps = fitting(asked(args, way, args.seeds[0], TRIAL.get(way, 6))[0], args.minutes * 60)
        for seed in args.seeds:
            times, found = asked(args, way, seed, steps)
            scores[way, seed] = found["mIoU"]
            lines.append([way, seed, steps, times["batch"], times["busy"] / 60, times["wall"] / 60, *found.values()])
            print(tabulate(lines[-1:], tablefmt="plain", floatfmt=".3f"), file=sys.stderr, flush=True)
    print(tabulate(lines, HEADERS, floatfmt=".3f"))
    print(f"\n{args.minutes:g} minutes of a processor each, {args.threads} threads, {machine(('torch', 'timm'))}")
    ours = max((mean(scores, way) for way in (FROZEN, TUNED) if way in args.only), default=None)
    for way in dict.fromkeys(way for way, _ in scores):
        if ours is not None and not way.startswith("dinoseg"):
            tell(Row(f"mIoU after {args.minutes:g} minutes, the better of ours", way, ours / mean(scores, way), 1.0))
    return 0


def mean(scores: dict[tuple[str, int], float], way: str) -> float:
    return statistics.fmean(score for (by, _), score in scores.items() if by == way)


def fitting(trial: dict[str, Any], seconds: float) -> int:
    """Return how many steps last so many seconds of the processor, by a trial of fewer."""
    late = trial["steps"][-max(4, len(trial["steps"]) // 10) :]
    return max(2, len(trial["steps"]) + 1 + int((seconds - trial["busy"]) / statistics.median(late)))


def asked(args: argparse.Namespace, way: str, seed: int, steps: int) -> tuple[dict[str, Any], dict[str, float]]:
    """Return what a way tells of its training in a process of its own, and its scores."""
    words = [str(args.data), "--weights", str(args.weights), "--batch", str(args.batch), "--seeds", str(seed)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "PYTHONWARNINGS": "ignore"}
    environment |= {"HF_HUB_OFFLINE": "1", "LIGHTLY_TRAIN_EVENTS_DISABLED": "1"}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, *words, "--threads", str(args.threads)]
        said = ran([*command, "--way", way, "--steps", str(steps)], folder, environment, way)
        score = ["mode=score", "protocol=semantic", "data=camvid", f"reference={args.data}/val/masks"]
        score += ["prediction=predicted", "hydra.run.dir=score"]
        ran([sys.executable, "-m", "dinoseg", *score], folder, environment, "mode=score")
        counted = json.loads((Path(folder) / "score/scores.json").read_text())
    of = {row["name"]: row["IoU"] for row in counted["per_class"]}
    return json.loads(said.splitlines()[-1]), {"mIoU": counted["scores"]["mIoU"], **{name: of[name] for name in THIN}}


def ran(command: list[str], folder: str, environment: dict[str, str], what: str) -> str:
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{what} failed:\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}")
    return done.stdout


def trained(args: argparse.Namespace) -> dict[str, Any]:
    """Train one way here, predict, and return its times: of all of the training, and of each step after the first."""
    import torch

    torch.set_num_threads(args.threads)
    ends: list[float] = []
    register_optimizer_step_post_hook(lambda *_: ends.append(time.process_time()))
    train = WAYS[args.way](args)
    busy, wall = time.process_time(), time.perf_counter()
    predict = train()
    busy, wall = time.process_time() - busy, time.perf_counter() - wall
    Path("predicted").mkdir(exist_ok=True)
    predict()
    batch = 2 if args.way.startswith("dinoseg") else args.batch
    steps = [later - sooner for sooner, later in zip(ends[:-1], ends[1:], strict=True)]
    return {"busy": busy, "wall": wall, "steps": steps, "batch": batch}


Way = Callable[[], Callable[[], None]]  # trains, and returns what predicts


def by_us(*changes: str) -> Callable[[argparse.Namespace], Way]:
    def prepared(args: argparse.Namespace) -> Way:
        import dinoseg.modes.train  # noqa: F401, imports are not measured

        of = [f"data.root={args.data}", "backbone=timm", f"backbone.name={VIT}", f"backbone.weights={args.weights}"]
        of += ["backbone.mean=[0.5,0.5,0.5]", "backbone.std=[0.5,0.5,0.5]", f"resolution.crop=[{SIZE[0]},{SIZE[1]}]"]
        of += [f"trainer.steps={args.steps}", f"trainer.val_every={args.steps}", f"seed={args.seeds[0]}"]
        of += ["hparam=detail_camvid", "engine=cpu", "engine.workers=0", "data.workers=1", "hydra.run.dir=run"]

        def train() -> Callable[[], None]:
            by_dinoseg([*of, *changes, "mode.report=false", "mode.pictures=0"])
            return predict

        def predict() -> None:
            words = ["mode=predict", "resume=run", f"input={args.data}/val/images", "hydra.run.dir=asked"]
            subprocess.run([sys.executable, "-m", "dinoseg", *words], check=True, stdout=subprocess.DEVNULL)
            Path("predicted").rmdir()
            Path("asked/masks").rename("predicted")

        return train

    return prepared


def by_hand(kind: str) -> Callable[[argparse.Namespace], Way]:
    def prepared(args: argparse.Namespace) -> Way:
        make = plain_segmenter.dpt if kind == "dpt" else plain_segmenter.Linear
        model = make(VIT, args.weights, len(CLASSES))

        def train() -> Callable[[], None]:
            plain_segmenter.train(model, kind, args.data / "train", SIZE, args.batch, args.steps, args.seeds[0])
            return lambda: write(args.data, lambda path: plain_segmenter.predict(model, path))

        return train

    return prepared


def by_lightly(kind: str) -> Callable[[argparse.Namespace], Way]:
    def prepared(args: argparse.Namespace) -> Way:
        import lightly_train
        import torch
        from lightly_train._models.dinov2_vit.dinov2_vit_src import dinov2_helper
        from lightly_train._models.dinov2_vit.dinov2_vit_src.models import vision_transformer as vits

        def tiny(**options: Any) -> Any:
            shape = {"patch_size": 16, "embed_dim": 192, "depth": 12, "num_heads": 3, "init_values": None}
            return vits.DinoVisionTransformer(**{**options, **shape, "img_size": 224, "block_chunks": 0})

        vits.vit_small = tiny
        dinov2_helper.load_weights = lambda model, **_: model  # DINOv2's own, which cannot be had offline
        torch.save(plain_segmenter.read(args.weights) | {"mask_token": torch.zeros(1, 192)}, "vit.pt")
        sides = {
            side: {part: str(args.data / side / part) for part in ("images", "masks")} for side in ("train", "val")
        }
        model_args = {"backbone_weights": "vit.pt"}
        seen = {"image_size": SIZE, "normalize": {"mean": [0.5] * 3, "std": [0.5] * 3}}
        if kind == "eomt":
            model_args["lr_warmup_steps"] = (args.steps // 20, args.steps // 10)

        def train() -> Callable[[], None]:
            lightly_train.train_semantic_segmentation(
                out="run",
                data={**sides, "classes": dict(enumerate(CLASSES)), "ignore_classes": [11]},
                model=f"dinov2/vits14-{kind}",
                steps=args.steps,
                batch_size=args.batch,
                gradient_accumulation_steps=1,
                num_workers=0,
                accelerator="cpu",
                precision="32-true",
                seed=args.seeds[0],
                model_args=model_args,
                transform_args={**seen, "val": {"smallest_max_size": {"max_size": SIZE[0], "prob": 1.0}}},
                logger_args={"val_every_num_steps": args.steps, "log_every_num_steps": 50},
                save_checkpoint_args={"save_every_num_steps": 10**9},
            )
            return predict

        def predict() -> None:
            model = lightly_train.load_model("run/exported_models/exported_last.pt")
            write(args.data, lambda path: model.predict(str(path)).numpy().astype(np.uint8))

        return train

    return prepared


def write(data: Path, ids: Callable[[Path], np.ndarray]) -> None:
    for path in sorted((data / "val/images").iterdir()):
        write_png(Path("predicted") / f"{path.stem}.png", ids(path))


WAYS: dict[str, Callable[[argparse.Namespace], Way]] = {
    FROZEN: by_us("engine.cache=memory"),
    TUNED: by_us("adapter=full", "engine.cache=off", "data.views=null", "data.augment.scale=[0.75,1.5]"),
    EOMT: by_lightly("eomt"),
    PROBE: by_lightly("linear"),
    DPT: by_hand("dpt"),
    PLAIN: by_hand("linear"),
}


if __name__ == "__main__":
    sys.exit(main())
