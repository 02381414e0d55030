"""Print time and memory of losses at full resolution, tile by tile, against upsampling all logits, side by side.

`python benchmarks/full_resolution_loss.py [--loss dice] [--classes 26 150] [--size 1088 1920] [--grid 68 120]
[--threads 2]`: loss and gradient of two images. The references are `F.interpolate` and `F.cross_entropy` (or dice
written out), eagerly and under torch.compile.
Each way is in processes of its own, in turns; of times the least counts, of memory what the first full-size call adds
to the process's peak after a small one. Exits with 1 where the tiles take more than `MAX` allows.
"""

import argparse
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from rows import Row, tell
from tabulate import tabulate
from torch import Tensor

from dinoseg.core.contracts import Loss
from dinoseg.core.geometry import upsample
from dinoseg.core.shapes import Batch, Prediction
from dinoseg.losses.cross_entropy import CrossEntropy
from dinoseg.losses.overlap import Dice

MAX = {26: (1.0, 0.2), 150: (1.2, 0.4)}  # classes to: times the eager reference's time, GiB
REFERENCES = ("usual", "compiled")
Way = Callable[[Tensor, Tensor, Tensor], Tensor]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--loss", choices=LOSSES, default="cross_entropy")
    parser.add_argument("--classes", type=int, nargs="+", default=[26, 150])
    parser.add_argument("--size", type=int, nargs=2, default=(1088, 1920))
    parser.add_argument("--grid", type=int, nargs=2, default=(68, 120))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        print(*measured(args))
        return 0
    rows, failed = [], False
    for classes in args.classes:
        found: dict[str, list[tuple[float, ...]]] = {way: [] for way in args.ways}
        for _ in range(args.rounds):
            for way in args.ways:
                found[way].append(run(way, classes))
        best = {way: tuple(map(min, zip(*values, strict=True))) for way, values in found.items()}
        tell(*told(args.loss, classes, best))
        rows += [row(way, classes, best) for way in args.ways]
        if args.loss == "cross_entropy" and classes in MAX and {"tiles", "usual"} <= best.keys():
            failed |= best["tiles"][0] > MAX[classes][0] * best["usual"][0] or best["tiles"][1] > MAX[classes][1]
    headers = ("classes", "way", "s", "GiB more", "time / usual", "time / compiled", "memory / usual", "loss")
    print(tabulate(rows, headers=headers, floatfmt=".3g"))
    print(f"\n{args.loss}, 2 x {args.size[0]} x {args.size[1]} from {args.grid[0]} x {args.grid[1]}, ", end="")
    print(f"{args.threads} threads, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}")
    return int(failed)


def told(loss: str, classes: int, best: dict[str, tuple[float, ...]]) -> list[Row]:
    """Return the ratios of the tiles against each reference that ran."""
    if "tiles" not in best:
        return []
    needed = {"usual": 1 / MAX[classes][0]} if loss == "cross_entropy" and classes in MAX else {}
    seconds, memory, _ = best["tiles"]
    what = f"loss at full resolution, {loss}, {classes} classes"
    return [
        row
        for way in REFERENCES
        if way in best
        for row in (
            Row(f"{what}, time", f"all logits upsampled, {way}", best[way][0] / seconds, needed.get(way)),
            Row(f"{what}, peak memory", f"all logits upsampled, {way}", best[way][1] / max(memory, 1e-3)),
        )
    ]


def row(way: str, classes: int, best: dict[str, tuple[float, ...]]) -> list[object]:
    seconds, memory, value = best[way]
    ratios = [seconds / best[other][0] if other in best else None for other in REFERENCES]
    return [
        classes,
        way,
        seconds,
        memory,
        *ratios,
        memory / best["usual"][1] if best.get("usual", (0, 0))[1] else None,
        value,
    ]


def run(way: str, classes: int) -> tuple[float, ...]:
    """Return seconds, GiB and the loss of one way, in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--way", way, "--classes", str(classes)]
    return tuple(map(float, subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()))


def measured(args: argparse.Namespace) -> tuple[float, float, float]:
    """Return the least seconds of two calls, the GiB that the first adds to a small one's peak, and the loss."""
    torch.set_num_threads(args.threads)
    classes = args.classes[0]
    weights = torch.rand(classes, generator=torch.Generator().manual_seed(0)) + 0.5
    way, seconds = made(args.loss, args.way), []
    called(way, *drawn(classes, (4, 6), (64, 96)), weights)
    given = drawn(classes, args.grid, args.size)
    before = peak()
    called(way, *given, weights)  # compiles
    memory = (peak() - before) / 2**30
    for _ in range(2):
        start = time.perf_counter()
        value = called(way, *given, weights)
        seconds.append(time.perf_counter() - start)
    return min(seconds), memory, value


def called(way: Way, grid: Tensor, mask: Tensor, weights: Tensor) -> float:
    grid.grad = None
    value = way(grid, mask, weights)
    value.backward()
    return value.item()


def drawn(classes: int, grid: tuple[int, int], size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return scores of a grid, and masks in blocks of 8 pixels, a tenth of them ignored."""
    draw = torch.Generator().manual_seed(0)
    scores = 3 * torch.randn(2, classes, *grid, generator=draw)
    blocks = torch.randint(0, classes, (2, size[0] // 8, size[1] // 8), generator=draw)
    blocks[torch.rand(blocks.shape, generator=draw) < 0.1] = 255
    return scores.requires_grad_(), blocks.to(torch.uint8).repeat_interleave(8, 1).repeat_interleave(8, 2)


def made(loss: str, way: str) -> Way:
    criterion, reference = LOSSES[loss]
    if way == "tiles":
        return partial(tiles, criterion)
    return torch.compile(reference, dynamic=False) if way == "compiled" else reference


def tiles(criterion: Callable[[Tensor], Loss], grid: Tensor, mask: Tensor, weights: Tensor) -> Tensor:
    prediction = Prediction(grid, (mask.shape[-2], mask.shape[-1]), (1.0, 1.0), upsample, grid=grid)
    return criterion(weights)(prediction, Batch(mask[:, None], mask, ["", ""]))[0]


def cross_entropy(grid: Tensor, mask: Tensor, weights: Tensor) -> Tensor:
    logits = F.interpolate(grid, mask.shape[-2:], mode="bilinear")
    return F.cross_entropy(logits, mask.long(), weights, ignore_index=255)


def dice(grid: Tensor, mask: Tensor, weights: Tensor) -> Tensor:
    shares = F.interpolate(grid, mask.shape[-2:], mode="bilinear").softmax(1)
    own = mask[:, None] == torch.arange(len(weights))[:, None, None]
    hits = torch.where(own, shares, 0).sum((0, 2, 3))
    claimed = torch.where((mask != 255)[:, None], shares, 0).sum((0, 2, 3))
    return (weights * (1 - 2 * hits / (claimed + own.sum((0, 2, 3))))).sum() / weights.sum()


WAYS = ("usual", "compiled", "tiles")
LOSSES: dict[str, tuple[Callable[[Tensor], Loss], Way]] = {
    "cross_entropy": (CrossEntropy, cross_entropy),
    "dice": (Dice, dice),
}


def peak() -> int:
    """Return the most bytes that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    sys.exit(main())
