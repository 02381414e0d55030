"""How fast features of images come back from the disk's cache, and how fast weights are hashed.

    OMP_NUM_THREADS=1 python benchmarks/feature_store.py [--folder outputs/.cache] [--samples 64] [--rounds 15]

Each reader stacks four samples to a batch, in turns; the best of all rounds counts. Files are in the system's memory by
then, so this is what a reader costs beside the disk. The references are NumPy's mapped arrays and safetensors.
"""

import argparse
import os
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dinoseg.extensions.feature_cache.key import weights_hash
from dinoseg.extensions.feature_cache.store import DiskStore
from dinoseg.utils.units import hash_of

SHAPES = {  # of what is stored of an image
    "ViT-S/16, 512 x 512, one map, float16": [(384, 32, 32)],
    "ViT-B/16, 512 x 512, four maps, float16": [(768, 32, 32)] * 4,
}
WEIGHTS = {"ViT-S, 22 M": 22_000_000, "ViT-B, 86 M": 86_000_000}


def write(folder: Path, shapes: Sequence[tuple[int, ...]], samples: int) -> dict[str, Callable[[int], list[Tensor]]]:
    """Write samples in each form, and return its reader, from a sample's number to its tensors."""
    store, checking = DiskStore(folder / "store", "run", "float16"), DiskStore(folder / "store", "run", "float16")
    for number in range(samples):
        tensors = [torch.randn(shape) for shape in shapes]
        kept = store.put(hash_of(number), tensors)
        save_file({str(place): tensor for place, tensor in enumerate(kept)}, folder / f"{number}.safetensors")
        for place, tensor in enumerate(kept):
            np.save(folder / f"{number}_{place}.npy", tensor.numpy())

    def stored(number: int) -> list[Tensor]:
        return store.get(hash_of(number)) or []

    def checked(number: int) -> list[Tensor]:
        checking._seen.clear()
        return checking.get(hash_of(number)) or []

    def mapped(number: int) -> list[Tensor]:
        paths = (folder / f"{number}_{place}.npy" for place in range(len(shapes)))
        return [torch.from_numpy(np.load(path, mmap_mode="c")) for path in paths]

    def tensors_of(number: int) -> list[Tensor]:
        with safe_open(folder / f"{number}.safetensors", "pt") as file:
            return [file.get_tensor(str(place)) for place in range(len(shapes))]

    return {
        "store": stored,
        "store, checking each (a process's first read)": checked,
        "np.load, mapped": mapped,
        "safetensors": tensors_of,
    }


def measure(readers: dict[str, Callable[[int], list[Tensor]]], samples: int, rounds: int) -> dict[str, float]:
    """Return the least seconds of a sample for each reader, read in turns and stacked by four."""
    best = dict.fromkeys(readers, float("inf"))
    for _ in range(rounds):
        for name, read in readers.items():
            begin = time.perf_counter()
            for first in range(0, samples - 3, 4):
                batch = [read(number) for number in range(first, first + 4)]
                for parts in zip(*batch, strict=True):
                    torch.stack(parts)
            best[name] = min(best[name], (time.perf_counter() - begin) / (samples // 4 * 4))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="on the disk that is to be measured")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for title, shapes in SHAPES.items():
        size = 2 * sum(np.prod(shape) for shape in shapes)
        print(f"\n{title}: {size / 2**20:.2f} MiB an image")
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            seconds = measure(write(Path(folder), shapes, args.samples), args.samples, args.rounds)
        for name, each in seconds.items():
            ratio = seconds["np.load, mapped"] / each
            print(f"{name:48}{1e3 * each:8.3f} ms{size / each / 1e9:8.1f} GB/s{ratio:8.2f} times np.load, mapped")
    print("\nhash of all weights")
    for title, count in WEIGHTS.items():
        weights = [("weights", part) for part in torch.randn(count).chunk(100)]
        begin = time.perf_counter()
        weights_hash(weights)
        print(f"{title:48}{time.perf_counter() - begin:8.3f} s")
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"\n{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, load {load}")


if __name__ == "__main__":
    main()
