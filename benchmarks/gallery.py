"""Render data, train three heads on the packaged backbone, track a video, and write the images of docs/gallery.md.

`python benchmarks/gallery.py [--out docs/pictures] [--work outputs/gallery] [--images 48] [--steps 200]` prints the
scores of the captions. It runs on a CPU and needs no download. `--work` must be a new folder: runs are not overwritten.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch
from PIL import Image

import dinoseg
from dinoseg.extensions.rendering.surgery.write import render_clip
from dinoseg.report.overlay import blend

SIZE = (128, 208)  # height, width in pixels
CLASSES = ("background", "instrument", "thread and needle", "suction tool", "clamp", "catheter")
MERGED = np.array([0, 1, 1, 1, 2, 2, 3, 1, 4, 5], np.uint8)  # rendered id to class id
PALETTE = ((0, 0, 0), (40, 120, 255), (255, 235, 0), (255, 130, 0), (200, 60, 255), (0, 220, 130))
HEADS = ("linear", "multiscale", "detail")
SHOWN = (0, 3, 5)  # validation images
FRAMES = (0, 9, 18, 29)  # frames of the video
UNTRACKED = "thread and needle"  # thinner than a patch
VAL_SEED = 1000  # of the first validation image
VIDEO_SEED = 1
Panel = tuple[str, np.ndarray]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/pictures"), help="folder of the images")
    parser.add_argument("--work", type=Path, default=Path("outputs/gallery"), help="new folder of data and runs")
    parser.add_argument("--images", type=int, default=48, help="training images; validation has a third of them")
    parser.add_argument("--steps", type=int, default=200, help="training steps of each head")
    args = parser.parse_args()
    write_data(args.work / "data", args.images)
    runs = {head: train(args.work, head, args.steps) for head in HEADS}
    for head, run in runs.items():
        print(f"{head}: mIoU {run.scores['miou']:.1%}", *(f"{x['class']} {x['iou']:.1%}" for x in run.scores.per_class))
    draw(args.out / "gallery_heads.jpg", [head_panels(args.work / "data", runs, index) for index in SHOWN], CLASSES[1:])
    tracked = [name for name in CLASSES[1:] if name != UNTRACKED]
    draw(args.out / "gallery_tracking.jpg", track(args.work), tracked)


def write_data(root: Path, count: int) -> None:
    """Write `count` training images and a third as many for validation, a frame of another operation each."""
    for split, seeds in {"train": range(count), "val": range(VAL_SEED, VAL_SEED + max(6, count // 3))}.items():
        for kind in ("images", "masks"):
            (root / split / kind).mkdir(parents=True)
        for seed in seeds:
            image, mask = next(render_clip(seed, 1, SIZE))
            Image.fromarray(image).save(root / split / f"images/{seed:04}.png")
            Image.fromarray(MERGED[mask]).save(root / split / f"masks/{seed:04}.png")


def train(work: Path, head: str, steps: int) -> Any:
    """Return the run of a head on the frozen packaged backbone."""
    return dinoseg.train(
        backbone="tiny_surgical",
        adapter="frozen",
        head=head,
        loss="ce_dice",
        data={"root": work / "data", "classes": list(CLASSES), "palette": PALETTE, "batch_size": 4, "views": 2},
        resolution={"crop": list(SIZE)},
        trainer={"steps": steps, "val_every": steps},
        optim={"optimizer": {"lr": 3e-3}},
        engine={"workers": 0},
        out_dir=work / head,
    )


def head_panels(data: Path, runs: dict[str, Any], index: int) -> list[Panel]:
    """Return a validation image, its predictions and its reference as labelled panels (H, W, 3)."""
    path = sorted((data / "val/images").iterdir())[index]
    image = np.array(Image.open(path))
    masks = {f"head={head}": run.load_model().predict(path).mask for head, run in runs.items()}
    masks["reference"] = np.array(Image.open(data / "val/masks" / path.name))
    return [("image", image), *((name, blend(image, mask, PALETTE, opacity=0.65)) for name, mask in masks.items())]


def track(work: Path) -> list[list[Panel]]:
    """Follow the objects of a rendered video from its first mask; print J&F and return panels of some frames."""
    clip = [(image, MERGED[mask]) for image, mask in render_clip(VIDEO_SEED, max(FRAMES) + 1, SIZE)]
    clip = [(image, np.where(mask == CLASSES.index(UNTRACKED), 0, mask)) for image, mask in clip]
    (work / "frames").mkdir()
    for index, (image, _) in enumerate(clip):
        Image.fromarray(image).save(work / f"frames/{index:03}.png")
    Image.fromarray(clip[0][1].astype(np.uint8)).save(work / "first.png")
    settings = {"short_side": 256, "upsample": "bilinear"}
    words = ("tracker=dinov3",)
    found = dinoseg.track("tiny_surgical", work / "frames", *words, labels=work / "first.png", tracker=settings,
                          out_dir=work / "tracked")  # fmt: skip
    masks = [np.array(Image.open(found.folder / f"masks/{index:03}.png")) for index in range(len(clip))]
    print(f"tracked: J&F {j_and_f(masks, clip):.1%}, first mask copied {j_and_f([masks[0]] * len(clip), clip):.1%}")
    rows = (("tracked", masks), ("reference", [mask for _, mask in clip]))
    return [
        [(f"frame {index}, {name}", blend(clip[index][0], row[index], PALETTE, opacity=0.65)) for index in FRAMES]
        for name, row in rows
    ]


def j_and_f(masks: Sequence[np.ndarray], clip: Sequence[tuple[np.ndarray, np.ndarray]]) -> float:
    """Return the mean J&F over the objects of the first mask and over all frames but the first and last, in 0..1."""
    objects = [int(each) - 1 for each in np.unique(clip[0][1]) if each]
    values = [
        torch.stack(dinoseg.metrics.region_and_boundary(torch.from_numpy(mask), torch.from_numpy(reference), 5))
        for mask, (_, reference) in zip(masks[1:-1], clip[1:-1], strict=True)
    ]
    return float(torch.stack(values)[..., objects].mean())


def draw(path: Path, rows: Sequence[Sequence[Panel]], classes: Sequence[str]) -> None:
    """Write rows of labelled panels and a legend of `classes` as a JPEG of 1,200 pixels in width."""
    height = 12 / len(rows[0]) * SIZE[0] / SIZE[1] + 0.3
    figure = Figure(figsize=(12, height * len(rows) + 0.6), layout=ConstrainedLayoutEngine(h_pad=0.1))
    for line, axes_of_line in zip(rows, figure.subplots(len(rows), len(rows[0]), squeeze=False), strict=True):
        for (label, pixels), axes in zip(line, axes_of_line, strict=True):
            axes.imshow(pixels)
            axes.set_title(label, fontsize=13)
            axes.set_axis_off()
    patches = [Patch(color=np.array(PALETTE[CLASSES.index(name)]) / 255, label=name) for name in classes]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), fontsize=13, frameon=False)
    figure.savefig(path, dpi=100, pil_kwargs={"quality": 82})
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
