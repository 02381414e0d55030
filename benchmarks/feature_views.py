"""Print the time of an image in mode=features and mode=example, as multiples of predicting it with a linear head.

`OMP_NUM_THREADS=1 python benchmarks/feature_views.py [--cases 518 1024] [--images 2] [--repeats 1]`. Backbones have
random weights: DINOv2's ViT-S/14 at 518 x 518 pixels, and DINOv3's ViT-S/16 at 1024 x 1024; all in float32 on the CPU.
Times are processor seconds, medians of the repeats, and leave out reading and writing of files:

- features: the basis is fitted, which computes the features twice, and the colours are drawn;
- positions removed: the same with `mode.position=remove`;
- example: classes and mask by one reference, whose features are known; by the default rule, and by clusters;
- subspace: of the positions, once for each size of images: a pass of a black image and an SVD in float64.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import torch
from rows import Row, machine, tell
from tabulate import tabulate

import dinoseg
from dinoseg.extensions.example.matcher import ExampleMatcher, ReferenceImage
from dinoseg.extensions.feature_views.drawing import enlarge, to_bytes
from dinoseg.extensions.feature_views.patches import PatchFeatures
from dinoseg.extensions.feature_views.view import fit_basis
from dinoseg.extensions.rendering.surgery.write import render_clip

BACKBONES = {518: "dinov2_vits14", 1024: "dinov3_vits16"}  # by side of the images in pixels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, nargs="+", choices=list(BACKBONES), default=list(BACKBONES))
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    rows = []
    for side in args.cases:
        seconds = measure(side, args.images, args.repeats)
        for way, taken in seconds.items():
            rows.append([BACKBONES[side], side, way, f"{taken:.2f}", f"{taken / seconds['predict']:.1f}"])
            tell(Row(f"{way}, {side} px, time", "mode=predict with a linear head", seconds["predict"] / taken))
    headers = ("backbone", "px", "way", "s", "times predict")
    print(tabulate(rows, headers, disable_numparse=True, colalign=("left", "right", "left", "right", "right")))
    print(machine())


def measure(side: int, images: int, repeats: int) -> dict[str, float]:
    """Return the processor seconds of an image by each way."""
    (given, ids), *clip = render_clip(1, images + 1, (side, side))
    targets = [image for image, _ in clip]
    model = dinoseg.create_model(
        BACKBONES[side],
        head="linear",
        classes=["background", "instrument"],
        **{"backbone.weights": "random"},
    )
    kept, free = (
        PatchFeatures(model.model.eval(), model.device, nullcontext, removes_position=removes)
        for removes in (False, True)
    )
    subspace = timed(lambda: free.position_basis((side, side)), 1)
    shown = np.isin(ids, (1, 2, 3))
    references = [ReferenceImage(given, np.stack([~shown, shown]))]
    plain = PatchFeatures(model.model, model.device, nullcontext, rank=0)
    example = ExampleMatcher(plain, references, rule="discriminant")
    insid3 = ExampleMatcher(free, references, rule="insid3")
    ways: dict[str, Callable[[], object]] = {
        "predict": lambda: [model.predict(image) for image in targets],
        "features": lambda: draw(kept, targets),
        "features, positions removed": lambda: draw(free, targets),
        "example": lambda: [example(image) for image in targets],
        "example, insid3": lambda: [insid3(image) for image in targets],
    }
    return {way: timed(run, repeats) / images for way, run in ways.items()} | {"subspace": subspace}


def draw(features: PatchFeatures, images: list[np.ndarray]) -> list[np.ndarray]:
    """Return colours of images in a basis that is fitted to them, from projections of its second pass."""
    seen = []

    def read():
        seen.clear()
        for image in images:
            seen.append(features(image))
            yield seen[-1]

    basis = fit_basis(read, [1, 2, 3], {})
    colours = [basis.colours(basis.project(patches.values)) for patches in seen]
    patch = features.backbone.patch_size
    return [
        to_bytes(enlarge(each, image.shape[:2], patches.size, patch))
        for each, image, patches in zip(colours, images, seen, strict=True)
    ]


def timed(run: Callable[[], object], repeats: int) -> float:
    """Return the processor seconds of a call, the median of the repeats."""
    found = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        found.append(time.process_time() - start)
    return statistics.median(found)


if __name__ == "__main__":
    main()
