"""AP of instance heads after equal minutes of training on rendered moving objects, beside a plain scoring script.

`python benchmarks/objects.py --weights FILE [--minutes 10 | --steps N] [--heads eomt mask2former pmt] [--seeds 0 1 2]`
renders videos, takes some frames of each as images with ids of objects, trains each head from a ViT-Tiny/16 by timm's
names for the given minutes of a processor (a trial measures a step; as many steps follow as fit) or the given steps,
and prints AP of the validation images. A script of 40 lines that shares no code with dinoseg scores the predictions of
`mode=predict mode.outputs=[coco]` again; the last row is the ratio of both.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rows import Row, machine, tell
from safetensors.torch import load_file, save_file
from tabulate import tabulate

TRIAL = 12  # steps that measure the time of one
FRAMES = 4  # of each video
RECIPES = {
    "eomt": ["head=eomt", "head.blocks=3", "adapter=full", "optim.optimizer.layer_decay=0.8"],
    "mask2former": ["head=mask2former", "adapter=full", "optim.optimizer.layer_decay=0.8"],
    "pmt": ["head=pmt", "adapter=frozen"],
}
TINY = ["backbone.arch.hidden_size=192", "backbone.arch.num_attention_heads=3", "backbone.arch.intermediate_size=768"]
BACKBONE = "vit.safetensors"  # without the classifier
HEADERS = ("head", "seed", "steps", "processor minutes", "AP", "AP50", "AP75", "AP50 by the plain script")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--steps", type=int, help="of each training, instead of --minutes")
    parser.add_argument("--heads", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--videos", type=int, default=128)
    parser.add_argument("--keep", type=Path, help="folder for data and runs; default: a temporary one")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.keep or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        data = make_images(folder, args.videos, args.size)
        tensors = load_file(args.weights)
        save_file({name: tensor for name, tensor in tensors.items() if not name.startswith("head.")}, folder / BACKBONE)
        lines = []
        for head in args.heads:
            for seed in args.seeds:
                lines.append([head, seed, *compare(folder, data, head, seed, args)])
                print(tabulate(lines[-1:], tablefmt="plain", floatfmt=".3f"), file=sys.stderr, flush=True)
    print(tabulate(lines, HEADERS, floatfmt=".3f"))
    length = f"{args.steps} steps" if args.steps else f"{args.minutes:g} minutes of a processor"
    print(f"\n{length} each, {machine(('torch', 'timm'))}")
    for line in lines:
        if line[-1]:
            tell(Row(f"AP50 of {line[0]}, seed {line[1]}", "plain scoring script", line[5] / line[-1]))
    return 0


def run_dinoseg(folder: Path, *words: str) -> None:
    """Run a command line in a folder, which receives caches and logs too."""
    done = subprocess.run([sys.executable, "-m", "dinoseg", *words], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{words} failed:\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}")


def busy_seconds() -> float:
    """Return processor seconds of all commands so far."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def make_images(folder: Path, videos: int, size: int) -> Path:
    """Render videos, and return a folder of some of their frames with masks of ids, 0 for the background."""
    data = folder / "data"
    if data.is_dir():
        return data
    rendered = folder / "rendered"
    counts = [f"render.train_videos={videos}", f"render.val_videos={max(1, videos // 4)}"]
    run_dinoseg(folder, "mode=render", "data=movi", f"data.root={rendered}", f"render.size=[{size},{size}]", *counts)
    for source, split in (("train", "train"), ("validation", "val")):
        take_frames(rendered / source, data / split, FRAMES)
    write_classes(data)
    return data


def take_frames(videos: Path, split: Path, count: int) -> None:
    """Copy frames of rendered videos and their masks of ids, evenly spread over each video."""
    for part in ("images", "masks"):
        (split / part).mkdir(parents=True)
    for video in sorted(videos.iterdir()):
        frames = sorted((video / "frames").iterdir())
        for frame in frames[:: max(1, len(frames) // count)][:count]:
            name = f"{video.name}_{frame.stem}.png"
            shutil.copy(frame, split / "images" / name)
            shutil.copy(video / "segmentations" / frame.name, split / "masks" / name)


def write_classes(data: Path) -> None:
    """Write that id 0 is the background, and each other id an object of one class."""
    (data / "classes.yaml").write_text(
        "classes:\n  background: {ids: [0]}\n  object: {ids: [1]}\nbackground: background\nothers: object\n"
    )


def compare(folder: Path, data: Path, head: str, seed: int, args: argparse.Namespace) -> list[float]:
    size = args.size
    words = ["mode=train", "data=folder_instances", f"data.root={data}", "task=instance", "loss=mask_classification"]
    words += ["backbone=dino_vits16", f"backbone.weights={folder / BACKBONE}", *TINY]
    words += ["backbone.mean=[0.5,0.5,0.5]", "backbone.std=[0.5,0.5,0.5]", f"resolution.crop=[{size},{size}]"]
    words += ["head.num_queries=30", "loss.criterion.num_points=2048", "data.batch_size=8", "engine=cpu"]
    words += ["optim.optimizer.lr=2.0e-4", "trainer.clip=0.01", f"seed={seed}", "mode.pictures=0", *RECIPES[head]]
    run = folder / f"{head}_{seed}"
    steps = args.steps or fit_steps(folder, words, args.minutes)
    begun = busy_seconds()
    run_dinoseg(folder, *words, f"trainer.steps={steps}", f"trainer.val_every={steps}", f"hydra.run.dir={run}")
    minutes = (busy_seconds() - begun) / 60
    scores = json.loads((run / "evaluation" / "scores.json").read_text())
    out = folder / f"{head}_{seed}_predicted"
    run_dinoseg(
        folder,
        "mode=predict",
        f"resume={run}",
        f"input={data}/val/images",
        "mode.outputs=[coco]",
        f"hydra.run.dir={out}",
    )
    plain = plain_ap50(data / "val/masks", out / "coco")
    return [steps, minutes, scores["AP"], scores["AP50"], scores["AP75"], plain]


def fit_steps(folder: Path, words: list[str], minutes: float) -> int:
    """Return how many steps fit into minutes of a processor, by the time of two short trials."""
    seconds = []
    for steps in (2, TRIAL):
        begun = busy_seconds()
        rest = [f"trainer.steps={steps}", f"trainer.val_every={steps}", "trainer.val_images=1", "mode.report=false"]
        run_dinoseg(folder, *words, *rest, "logger=[]")
        seconds.append(busy_seconds() - begun)
    step = (seconds[1] - seconds[0]) / (TRIAL - 2)
    return max(2, int(60 * minutes / step))


def plain_ap50(masks: Path, out: Path) -> float:
    """Return AP at an IoU of 0.5 of the one class, at 101 recalls, from the files alone."""
    names = {image["id"]: image["file_name"] for image in json.loads((out / "annotations.json").read_text())["images"]}
    results = sorted(json.loads((out / "results.json").read_text()), key=lambda result: -result["score"])
    references = {path.name: np.asarray(Image.open(path)) for path in sorted(masks.iterdir())}
    left = {name: {*np.unique(ids[ids > 0]).tolist()} for name, ids in references.items()}
    total = sum(map(len, left.values()))
    hits = []
    for result in results:
        name = names[result["image_id"]]
        ids, mask = references[name], decode(result["segmentation"])
        ious = {number: (mask & (ids == number)).sum() / (mask | (ids == number)).sum() for number in left[name]}
        best = max(ious, key=ious.get, default=None)
        hits.append(best is not None and ious[best] >= 0.5)
        left[name] -= {best} if hits[-1] else set()
    found = np.cumsum(hits)
    precisions = np.maximum.accumulate((found / np.arange(1, len(hits) + 1))[::-1])[::-1]
    recalls = found / total
    at = [
        int(np.argmax(recalls >= recall - 1e-9)) if len(hits) and recalls[-1] >= recall - 1e-9 else None
        for recall in np.linspace(0, 1, 101)
    ]
    return float(np.mean([0.0 if place is None else precisions[place] for place in at]))


def decode(segmentation: dict[str, Any]) -> np.ndarray:
    """Return the mask (H, W) of COCO's compressed run lengths."""
    counts: list[int] = []
    value = shift = 0
    for letter in segmentation["counts"]:
        code = ord(letter) - 48
        value |= (code & 31) << shift
        shift += 5
        if not code & 32:
            value -= (1 << shift) if code & 16 else 0
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    height, width = segmentation["size"]
    return np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(width, height).T


if __name__ == "__main__":
    sys.exit(main())
