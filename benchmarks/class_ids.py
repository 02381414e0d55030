"""Print time and memory of scoring a grid of scores, against upsampling all classes and taking the highest.

`python benchmarks/class_ids.py [--size 1088 1920] [--threads 1] [--repeats 5] [--scores FILE ...]`: class ids, and
their confusion matrix with a mask, the ways in turn on the same scores, the least of the repeats; memory in a process
of its own each. A FILE, of `torch.save`, holds scores (1, K, h, w) of a trained model, which are a row more. Exits with
1 where ids differ whose scores do not tie.
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
from rows import Row, tell
from tabulate import tabulate
from torch import Tensor

from dinoseg.core.class_ids import class_ids
from dinoseg.metrics.confusion import ConfusionMatrix

GRIDS, CLASSES = ((68, 120), (136, 240)), (10, 26, 150)
MIB = 2**20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, nargs=2, default=(1088, 1920))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--classes", type=int, nargs="+", default=CLASSES)
    parser.add_argument("--scores", nargs="+", default=[])
    parser.add_argument("--memory", nargs=4, help=argparse.SUPPRESS)  # WAY CLASSES ROWS COLUMNS
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    size = (args.size[0], args.size[1])
    if args.memory:
        print(extra_bytes(args.memory[0], *map(int, args.memory[1:]), size))
        return 0
    rows, differing = [], 0
    given = [(f"smooth, {classes}", smooth(classes, *grid)) for classes in args.classes for grid in GRIDS]
    trained = [torch.load(file, weights_only=True) for file in args.scores]
    given += [(f"trained, {scores.shape[1]}", scores) for scores in trained]
    for name, scores in given:
        seconds, ids = timed(scores, size, args.repeats)
        differing += apart(ids["usual"], ids["ours"], scores, size)
        best = min(seconds["usual"], seconds["channels last"])
        what, upsampled = f"class ids and their confusion, {name} classes", "all classes upsampled, the better layout"
        tell(Row(f"{what}, {scores.shape[2]} x {scores.shape[3]}, time", upsampled, best / seconds["ours"]))
        row = [name, f"{scores.shape[2]} x {scores.shape[3]}", *(f"{seconds[way] * 1e3:.0f}" for way in WAYS)]
        row.append(f"{best / seconds['ours']:.1f}")
        if name.startswith("smooth"):
            memory = {way: measured(way, scores, args) / MIB for way in ("usual", "ours")}
            smaller = memory["usual"] / max(1, memory["ours"])
            tell(Row(f"{what}, {scores.shape[2]} x {scores.shape[3]}, peak memory", "all classes upsampled", smaller))
            row += [*(f"{taken:.0f}" for taken in memory.values()), f"{smaller:.0f}"]
        rows.append(row)
    headers = ("scores, classes", "grid", *(f"{way} ms" for way in WAYS), "ratio", "usual MiB", "ours MiB", "ratio")
    print(tabulate(rows, headers=headers))
    print(
        f"\nids and counts of {size[0]} x {size[1]}; {differing} ids differ that do not tie; usual: F.interpolate, max"
    )
    print("over the classes, bincount of int64 pairs; channels last: the same of scores in that layout; ratio: to the")
    print(f"better one; torch {torch.__version__}, {platform.machine()}, {args.threads} threads, ", end="")
    print(f"load {os.getloadavg()[0]:.1f}")
    return int(differing > 0)


def apart(usual: Tensor, ours: Tensor, scores: Tensor, size: tuple[int, int]) -> int:
    """Return how many ids differ where the two classes' scores do by more than rounding."""
    image, y, x = (usual != ours).nonzero().T
    pixels = F.interpolate(scores, size, mode="bilinear")[image, :, y, x]
    first, second = (pixels.gather(1, ids[image, y, x].long()[:, None]) for ids in (usual, ours))
    return int((first - second > 1e-6 * scores.abs().max()).sum())


def smooth(classes: int, rows: int, columns: int) -> Tensor:
    """Return scores (1, K, h, w) of regions with noise, in which some classes are seldom or never the highest."""
    draw = torch.Generator().manual_seed(0)
    regions = torch.randn(1, classes, rows // 8 + 1, columns // 8 + 1, generator=draw) * 4
    scores = F.interpolate(regions, (rows, columns), mode="bicubic")
    scores += 3 * torch.randn(1, classes, 1, 1, generator=draw)
    return scores + 0.3 * torch.randn(scores.shape, generator=draw)


def usual(scores: Tensor, size: tuple[int, int], mask: Tensor) -> Tensor:
    """Return ids of scores of all pixels; `argmax` in place of `max` takes longer."""
    ids = F.interpolate(scores, size, mode="bilinear").max(dim=1).indices
    kept, classes = mask != 255, scores.shape[1]
    torch.bincount(mask[kept].long() * classes + ids[kept], minlength=classes**2)
    return ids.to(torch.uint8)


def channels_last(scores: Tensor, size: tuple[int, int], mask: Tensor) -> Tensor:
    """Return the same of scores whose classes lie side by side."""
    return usual(scores.contiguous(memory_format=torch.channels_last), size, mask)


def ours(scores: Tensor, size: tuple[int, int], mask: Tensor) -> Tensor:
    """Return ids of the grid."""
    ids = class_ids(scores, size, (1.0, 1.0))
    ConfusionMatrix(scores.shape[1]).update(ids, mask)
    return ids


WAYS: dict[str, Callable[[Tensor, tuple[int, int], Tensor], Tensor]] = {
    "usual": usual,
    "channels last": channels_last,
    "ours": ours,
}


def drawn(classes: int, size: tuple[int, int]) -> Tensor:
    """Return a mask (1, H, W) in blocks of 8 pixels, a tenth of them ignored."""
    draw = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, classes, (1, -(-size[0] // 8), -(-size[1] // 8)), generator=draw)
    blocks[torch.rand(blocks.shape, generator=draw) < 0.1] = 255
    return blocks.byte().repeat_interleave(8, 1).repeat_interleave(8, 2)[:, : size[0], : size[1]].contiguous()


def timed(scores: Tensor, size: tuple[int, int], repeats: int) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Return the least seconds of each way, and its ids."""
    seconds, ids, mask = dict.fromkeys(WAYS, float("inf")), {}, drawn(scores.shape[1], size)
    with torch.inference_mode():
        for _ in range(repeats):
            for way, function in WAYS.items():
                start = time.perf_counter()
                ids[way] = function(scores, size, mask)
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
        WAYS[way](scores[:, :, :8, :8], (64, 64), drawn(classes, (64, 64)))  # what libraries take at a first call
        mask, before = drawn(classes, size), most_held()
        WAYS[way](scores, size, mask)
    return most_held() - before


def most_held() -> int:
    """Return the most bytes that this process has held; `getrusage` counts what its parent held before it started."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


if __name__ == "__main__":
    sys.exit(main())
