"""Print time and memory of class ids from a grid of scores, against upsampling all classes and taking the highest.

`OMP_NUM_THREADS=1 python benchmarks/class_ids.py [--size 1088 1920] [--repeats 5] [--scores FILE]`: both in turn on the
same scores, the least of the repeats; memory in a process of its own each. FILE, of `torch.save`, holds scores (1, K,
h, w) of a trained model, which are a row more. Exits with 1 where an id differs.
"""

import argparse
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor

from dinoseg.class_ids import class_ids

GRIDS, CLASSES = ((68, 120), (136, 240)), (10, 26, 150)
MIB = 2**20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, nargs=2, default=(1088, 1920))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--scores")
    parser.add_argument("--memory", nargs=4, help=argparse.SUPPRESS)  # WAY CLASSES ROWS COLUMNS
    args = parser.parse_args()
    torch.set_num_threads(1)
    size = (args.size[0], args.size[1])
    if args.memory:
        print(extra_bytes(args.memory[0], *map(int, args.memory[1:]), size))
        return 0
    rows, differing = [], 0
    given = [(f"smooth, {classes}", smooth(classes, *grid)) for classes in CLASSES for grid in GRIDS]
    if args.scores:
        scores = torch.load(args.scores, weights_only=True)
        given.append((f"trained, {scores.shape[1]}", scores))
    for name, scores in given:
        seconds, ids = timed(scores, size, args.repeats)
        differing += int((ids["usual"] != ids["ours"]).sum())
        row = [name, f"{scores.shape[2]} x {scores.shape[3]}", *(f"{seconds[way] * 1e3:.0f}" for way in WAYS)]
        row.append(f"{seconds['usual'] / seconds['ours']:.1f}")
        if name.startswith("smooth"):
            memory = {way: measured(way, scores, args) / MIB for way in WAYS}
            row += [*(f"{memory[way]:.0f}" for way in WAYS), f"{memory['usual'] / max(1, memory['ours']):.0f}"]
        rows.append(row)
    headers = ("scores, classes", "grid", "usual ms", "ours ms", "ratio", "usual MiB", "ours MiB", "ratio")
    print(tabulate(rows, headers=headers))
    print(f"\nids of {size[0]} x {size[1]}; {differing} differ; usual: F.interpolate, then max over the classes")
    print(f"torch {torch.__version__}, {platform.machine()}, one thread, load {os.getloadavg()[0]:.1f}")
    return int(differing > 0)


def smooth(classes: int, rows: int, columns: int) -> Tensor:
    """Return scores (1, K, h, w) of regions with noise, in which some classes are seldom or never the highest."""
    draw = torch.Generator().manual_seed(0)
    regions = torch.randn(1, classes, rows // 8 + 1, columns // 8 + 1, generator=draw) * 4
    scores = F.interpolate(regions, (rows, columns), mode="bicubic")
    scores += 3 * torch.randn(1, classes, 1, 1, generator=draw)
    return scores + 0.3 * torch.randn(scores.shape, generator=draw)


def usual(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """Return ids of scores of all pixels; `argmax` in place of `max` takes longer."""
    return F.interpolate(scores, size, mode="bilinear").max(dim=1).indices.to(torch.uint8)


def ours(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """Return ids of the grid."""
    return class_ids(scores, size, (1.0, 1.0))


WAYS: dict[str, Callable[[Tensor, tuple[int, int]], Tensor]] = {"usual": usual, "ours": ours}


def timed(scores: Tensor, size: tuple[int, int], repeats: int) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Return the least seconds of each way, and its ids."""
    seconds, ids = dict.fromkeys(WAYS, float("inf")), {}
    with torch.inference_mode():
        for _ in range(repeats):
            for way, function in WAYS.items():
                start = time.perf_counter()
                ids[way] = function(scores, size)
                seconds[way] = min(seconds[way], time.perf_counter() - start)
    return seconds, ids


def measured(way: str, scores: Tensor, args: argparse.Namespace) -> int:
    """Return the bytes that a way takes beside the scores, in a process of its own."""
    numbers = [str(number) for number in (*scores.shape[1:], *args.size)]
    command = [sys.executable, __file__, "--memory", way, *numbers[:3], "--size", *numbers[3:]]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def extra_bytes(way: str, classes: int, rows: int, columns: int, size: tuple[int, int]) -> int:
    """Return how far a way raises the most that this process has held."""
    scores = smooth(classes, rows, columns)
    with torch.inference_mode():
        WAYS[way](scores[:, :, :8, :8], (64, 64))  # what libraries take at a first call
        before = most_held()
        WAYS[way](scores, size)
    return most_held() - before


def most_held() -> int:
    """Return the most bytes that this process has held; `getrusage` counts what its parent held before it started."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


if __name__ == "__main__":
    sys.exit(main())
