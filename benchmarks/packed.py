"""Print how many more training samples a second packed data gives than 1080p PNG and JPEG files, side by side.

`OMP_NUM_THREADS=1 python benchmarks/packed.py [--frames 12] [--longest 960] [--crop 512 512] [--repeats 5]`: one
process, one thread, both in turn, files in the page cache; exits with 1 where the ratio is below its least.
"""

import argparse
import itertools
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from rows import Row, machine, tell
from tabulate import tabulate

from dinoseg.data.formats.folder import folder_dataset
from dinoseg.data.loader import TrainViews, train_batches
from dinoseg.data.transforms import Affine, Augment, ColorJitter
from dinoseg.extensions.packed.pack import pack
from dinoseg.utils.images import write_png

SIZE = (1080, 1920)
CLASSES = 26
MIN = 5.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=12)
    parser.add_argument("--longest", type=int, default=960)
    parser.add_argument("--crop", type=int, nargs=2, default=(512, 512))
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    augment = Augment(
        args.crop,
        scale=(0.75, 1.5),
        longest=args.longest,
        affine=Affine(10, 0.1, 0),
        flip=0.5,
        color=ColorJitter(0.2, 0.2, 0.2, 0.05),
    )
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_frames(root, args.frames)
        files = folder_dataset(root, "train", classes=[f"c{number}" for number in range(CLASSES)])
        start = time.perf_counter()
        ways: dict[str, Any] = {
            "PNG files": files,
            "JPEG files": folder_dataset(as_jpeg(root), "train", classes=files.classes),
            f"packed, longest={args.longest}": pack(files, cache_dir=root, longest=args.longest, workers=1),
        }
        packing = time.perf_counter() - start
        ways["packed, full size"] = pack(files, cache_dir=root, longest=None, workers=1)
        rates = measure(ways, augment, args.repeats)
        bytes_each = {
            "PNG files": sum(path.stat().st_size for path in (root / "train").rglob("*.png")) / args.frames,
            "JPEG files": sum(path.stat().st_size for path in (root / "jpeg").rglob("*.*g")) / args.frames,
            **{name: way.store.size / args.frames for name, way in ways.items() if hasattr(way, "store")},
        }
    reference = rates["PNG files"]
    rows = [
        (name, f"{rate:.1f}", f"{rate / reference:.1f}", f"{bytes_each[name] / 2**20:.2f}")
        for name, rate in rates.items()
    ]
    print(tabulate(rows, ["training data", "samples/s", "ratio", "MiB a sample"], disable_numparse=True))
    ratio = rates[f"packed, longest={args.longest}"] / reference
    print(f"packing took {packing / args.frames * 1000:.0f} ms an image; needed: {MIN:.1f}, reached: {ratio:.1f}")
    print(
        f"{args.frames} frames of {SIZE[1]} x {SIZE[0]}, crop {args.crop}, median of {args.repeats} passes; "
        f"{machine(('torch', 'numpy', 'opencv-python-headless', 'Pillow'))}; one process, one thread"
    )
    tell(Row(f"packed data, longest={args.longest}, samples/s", "PNG files of 1080p, same order and views", ratio, MIN))
    return int(ratio < MIN)


def measure(ways: dict[str, Any], augment: Augment, repeats: int) -> dict[str, float]:
    """Return samples/s of each way: the median over passes that take turns, after one of each to warm up."""
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, data in ways.items():
            count = len(data)
            start = time.perf_counter()
            for batch in itertools.islice(train_batches(TrainViews(data, augment, turn), batch_size=2), count // 2):
                assert batch.image.shape[-2:] == augment.crop
            if turn:
                rates[name].append(count // 2 * 2 / (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in rates.items()}


def write_frames(root: Path, count: int) -> None:
    """Write frames with texture at every scale and sensor noise, and masks of patches with ragged borders."""
    rng = np.random.default_rng(0)
    for number in range(count):
        write_png(root / f"train/images/{number}.png", texture(rng, 3).clip(0, 255).astype(np.uint8))
        patches = np.floor(texture(rng, 1)[..., 0] / 256 * CLASSES).clip(0, CLASSES - 1)
        write_png(root / f"train/masks/{number}.png", cv2.medianBlur(patches.astype(np.uint8), 5))


def as_jpeg(root: Path) -> Path:
    """Write the frames below `root` as JPEG too, beside their masks, and return the folder."""
    (root / "jpeg/train/images").mkdir(parents=True)
    shutil.copytree(root / "train/masks", root / "jpeg/train/masks")
    for path in (root / "train/images").iterdir():
        with Image.open(path) as image:
            image.save(root / f"jpeg/train/images/{path.stem}.jpg", quality=90)
    return root / "jpeg"


def texture(rng: np.random.Generator, channels: int) -> np.ndarray:
    """Return (H, W, C) float32 about 128: noise at doubling scales, as coarse as it is strong."""
    pixels = np.full((*SIZE, channels), 128, np.float32)
    for scale in (1, 4, 16, 64, 256):
        size = (-(-SIZE[0] // scale), -(-SIZE[1] // scale), channels)
        noise = rng.normal(0, 3 * scale**0.5, size).astype(np.float32)
        pixels += cv2.resize(noise, SIZE[::-1], interpolation=cv2.INTER_CUBIC).reshape(pixels.shape)
    return pixels


if __name__ == "__main__":
    sys.exit(main())
