"""Print how much faster an epoch on kept features is than one on images, side by side.

`python benchmarks/feature_cache.py [--cases vits vitb m2f] [--images 8] [--size 512] [--classes 26] [--threads 2]
[--dtype float16]`: an epoch of training (reading, model, loss at full resolution, gradient, update) on images of one
size, live and after the first epoch has kept what the frozen part gives; batches of 2. `vits` and `vitb` are DINOv3's
shapes with random weights under a linear head; `m2f` is ViT-S under a Mask2Former head whose class layer alone learns,
as in hparam=idd_m2f. Epochs of both kinds in turns, of each the quickest counts, by the clock and by the processor's
time, which other programs lengthen less. Exits with 1 where both ratios are below `WANTED`.
"""

import argparse
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rows import Row, tell
from tabulate import tabulate

from dinoseg.core.contracts import Head
from dinoseg.data.classes.labels import Labels
from dinoseg.data.classes.masks import Masks
from dinoseg.data.pairs.dataset import PairDataset
from dinoseg.data.pairs.pair import Pair
from dinoseg.data.transforms import Augment, ColorJitter
from dinoseg.extensions.feature_cache.choice import CacheOptions, feature_cache
from dinoseg.extensions.query_heads.mask2former.head import Mask2FormerHead
from dinoseg.losses.cross_entropy import CrossEntropy
from dinoseg.models.adapters import Frozen
from dinoseg.models.backbones.transformers_vit import TransformersVit
from dinoseg.models.heads.linear import LinearHead
from dinoseg.models.model import SegmentationModel
from dinoseg.training.engine import Engine
from dinoseg.training.image_data_module import ImageDataModule
from dinoseg.training.optim import adamw
from dinoseg.utils.images import write_png

WANTED = {"vits": 10, "vitb": 30}
SHAPES = {"vits": (384, 6), "m2f": (384, 6), "vitb": (768, 12)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--classes", type=int, default=26)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", default="float16")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows, failed = [], False
    for case in args.cases:
        with tempfile.TemporaryDirectory() as folder:
            live, kept, first, size = epochs(case, args, Path(folder))
        wanted, (ratio, of_processor) = WANTED.get(case), live / kept
        failed |= wanted is not None and max(ratio, of_processor) < wanted
        what, reference = f"epoch on kept features, {case}, {args.size} x {args.size}", "the same on images, live"
        tell(
            Row(f"{what}, wall time", reference, ratio), Row(f"{what}, processor time", reference, of_processor, wanted)
        )
        rows.append([case, live[0], first[0], kept[0], ratio, of_processor, wanted, size / args.images / 2**20])
    headers = ("case", "live: s an epoch", "first, kept", "later", "live / later", "of processor time", "wanted")
    headers = (*headers, "MiB an image")
    print(tabulate(rows, headers=headers, floatfmt=".3g"))
    print(f"\n{args.images} images of {args.size} x {args.size}, {args.classes} classes, float32, kept as {args.dtype}")
    print(f"{args.threads} threads, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores; ", end="")
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}")
    return int(failed)


def epochs(case: str, args: argparse.Namespace, folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Return the `clocks` of an epoch on images, on kept features and of the first one that keeps them; their bytes."""
    data = drawn(folder, args)
    engine = Engine("cpu", "fp32", workers=0, cache="disk")
    model, loss = made(case, args.classes), CrossEntropy(torch.ones(args.classes))
    optimizer = adamw(model, lr=1e-3, weight_decay=0.0)
    augment = Augment((args.size, args.size), scale=(0.75, 1.5), flip=0.5, color=ColorJitter(0.2, 0.2, 0.2, 0.05))
    share = {"batch_size": 2, "seed": 0, "workers": 0, "views": 1}
    live, kept = (ImageDataModule(data, data, augment, **share) for _ in range(2))
    plan = CacheOptions(folder / "cache", 10.0, "benchmark", {}, dtype=args.dtype)
    kept.cache = feature_cache(kept, model, engine, plan)
    model.train()

    def epoch(data_module: ImageDataModule) -> np.ndarray:
        batches, start = data_module.train_batches(0), clocks()
        for _ in range(args.images // 2):
            batch = next(batches).to(engine.device)
            value, _ = loss(model(batch.image), batch)
            engine.backward(value)
            engine.optimizer_step(optimizer, value.detach(), torch.ones(()), clip=1.0)
        return np.subtract(clocks(), start)

    first = epoch(kept)
    found = np.array([(epoch(live), epoch(kept)) for _ in range(args.rounds)])
    size = sum(path.stat().st_size for path in (folder / "cache").rglob("*.features"))
    return *found.min(0), first, size


def clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def made(case: str, classes: int) -> SegmentationModel:
    dim, heads = SHAPES[case]
    arch = {"hidden_size": dim, "num_hidden_layers": 12, "num_attention_heads": heads, "intermediate_size": 4 * dim}
    layers = "quarters" if case == "m2f" else [-1]
    torch.manual_seed(0)
    backbone = Frozen()(TransformersVit("dinov3_vit", {**arch, "num_register_tokens": 4}, "random", 16, layers))
    head: Head = LinearHead(dim, 1, classes)
    if case == "m2f":
        head = Mask2FormerHead(dim, 4, classes, no_object=False, deep_supervision=False)
        head.requires_grad_(False).predictor.class_embed.requires_grad_(True)
    return SegmentationModel(backbone, head)


def drawn(folder: Path, args: argparse.Namespace) -> PairDataset:
    """Write smooth pictures as JPEG files, with masks of blocks."""
    pairs, chance = [], np.random.default_rng(0)
    for number in range(args.images):
        image, mask = folder / f"{number}.jpg", folder / f"{number}.png"
        small = Image.fromarray(chance.integers(0, 256, (32, 32, 3)).astype(np.uint8))
        small.resize((args.size, args.size), Image.Resampling.BICUBIC).save(image)
        blocks = chance.integers(0, args.classes, (16, 16)).astype(np.uint8)
        write_png(mask, np.kron(blocks, np.ones((args.size // 16, args.size // 16), np.uint8)))
        pairs.append(Pair(str(number), image, mask))
    labels = Labels([str(number) for number in range(args.classes)], [(0, 0, 0)] * args.classes, 255)
    return PairDataset(pairs, labels, Masks())


if __name__ == "__main__":
    sys.exit(main())
