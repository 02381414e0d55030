"""Print how much faster and smaller label propagation is than its dense form, side by side, one thread.

`OMP_NUM_THREADS=1 python benchmarks/tracking.py [--grid 60 107] [--channels 384] [--labels 4] [--repeats 5]`. The dense
form is the usual one: a matrix product of the target frame with all cells of all context frames, a mask, top-k and
softmax; here every step in place. Peak memory is what a fresh process grows by, the context's features included (median
of 3 processes). Exits with 1 where a ratio misses its bound or the masks differ.
"""

import argparse
import multiprocessing
import resource
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor

import torch
import torch.nn.functional as F
from rows import Row, tell
from tabulate import tabulate
from torch import Tensor

from dinoseg.extensions.tracking.grid.propagator import Propagator
from dinoseg.extensions.tracking.propagation.masks import to_mask
from dinoseg.extensions.tracking.propagation.settings import DINOV3

FASTER, SMALLER = 3.0, 5.0
KIB = 1024 if sys.platform == "darwin" else 1  # what one unit of ru_maxrss is: bytes there, KiB elsewhere
Size = tuple[tuple[int, int], int, int]  # grid, channels, labels


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--grid", type=int, nargs=2, default=(60, 107))
    parser.add_argument("--channels", type=int, default=384)
    parser.add_argument("--labels", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    size = (tuple(args.grid), args.channels, args.labels)
    peaks = {way: statistics.median(in_fresh_process(way, size) for _ in range(3)) for way in ("dense", "window")}
    seconds, soft = in_turns(size, args.repeats)
    same = torch.equal(to_mask(soft["dense"], size[0]), to_mask(soft["window"], size[0]))
    middle = {way: statistics.median(times) for way, times in seconds.items()}
    faster, smaller = middle["dense"] / middle["window"], peaks["dense"] / peaks["window"]
    rows = [(way, f"{middle[way]:.2f}", f"{min(seconds[way]):.2f}", f"{peaks[way]:.0f}") for way in seconds]
    print(tabulate(rows, ["way", "s/frame, median", "least", "peak MiB"], disable_numparse=True))
    print(f"faster: {faster:.1f} x (needed: {FASTER:.0f}); peak memory: 1/{smaller:.1f} (needed: 1/{SMALLER:.0f})")
    difference = (soft["dense"] - soft["window"]).abs().max()
    print(f"masks equal: {same}; soft labels differ by at most {difference:.1e}")
    print(
        f"{size[0][0]} x {size[0][1]} cells, {size[1]} channels, {size[2]} labels, frame 0 and {DINOV3.context} more, "
        f"circle of {DINOV3.radius}; torch {torch.__version__}, one thread, median of {args.repeats} turns"
    )
    dense_form = "all similarities as one matrix, in place"
    tell(Row("label propagation, time a frame", dense_form, faster, FASTER))
    tell(Row("label propagation, peak memory", dense_form, smaller, SMALLER))
    return int(faster < FASTER or smaller < SMALLER or not same)


def in_turns(size: Size, repeats: int) -> tuple[dict[str, list[float]], dict[str, Tensor]]:
    """Return the seconds of each turn of each way, and the soft labels they give; the first turns warm up."""
    torch.set_num_threads(1)
    target, propagator = situation(size)
    state, outside = propagator.state(), too_far(size[0])
    seconds: dict[str, list[float]] = {"dense": [], "window": []}
    soft = {}
    for turn in range(repeats + 1):
        propagator.load(state)
        for way in seconds:
            start = time.perf_counter()
            soft[way] = propagator.step(target) if way == "window" else dense(target, state, outside)
            if turn:
                seconds[way].append(time.perf_counter() - start)
    return seconds, soft


def in_fresh_process(way: str, size: Size) -> float:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(peak, way, size).result()


def peak(way: str, size: Size) -> float:
    """Return by how many MiB this process grows while it labels one frame, its context included."""
    torch.set_num_threads(1)
    label(way, ((6, 10), 8, 4))  # loads the libraries
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    label(way, size)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / KIB / 1024


def label(way: str, size: Size) -> None:
    target, propagator = situation(size)
    if way == "window":
        propagator.step(target)
    else:
        state = propagator.state()
        del propagator
        dense(target, state, too_far(size[0]))


def situation(size: Size) -> tuple[Tensor, Propagator]:
    """Return a frame's features and a full context: a texture that drifts under noise, labels in columns."""
    grid, channels, labels = size
    draw = torch.Generator().manual_seed(0)
    scene = F.avg_pool2d(torch.randn(1, channels, *grid, generator=draw), 3, 1, 1)[0]  # neighbours are alike
    columns = (torch.arange(grid[1]) * labels // grid[1]).expand(grid)
    propagator = Propagator(DINOV3)
    for number in range(DINOV3.context + 1):
        propagator.step(drifted(scene, number, draw), columns if number == 0 else None)
    return drifted(scene, DINOV3.context + 1, draw), propagator


def drifted(scene: Tensor, number: int, draw: torch.Generator) -> Tensor:
    return scene.roll((number, 2 * number), (1, 2)) + 0.2 * torch.randn(scene.shape, generator=draw)


def too_far(grid: tuple[int, int]) -> Tensor:
    """Say of all pairs of cells whether they are outside of one another's circle: (N, N), True = outside."""
    places = torch.cartesian_prod(torch.arange(grid[0]), torch.arange(grid[1])).float()
    return torch.cdist(places, places, compute_mode="donot_use_mm_for_euclid_dist") > DINOV3.radius


@torch.no_grad()
def dense(target: Tensor, state: dict[str, Tensor], outside: Tensor) -> Tensor:
    """Return the soft labels (L, h, w) by all similarities of the target (C, h, w) to the context."""
    queries = F.normalize(target.flatten(1).T, dim=1)  # (N, C)
    scores = queries @ state["features"].flatten(0, 2).T  # (N, t N)
    scores.unflatten(1, (-1, len(queries))).masked_fill_(outside[:, None], -torch.inf)
    least = scores.topk(DINOV3.top_k).values[:, -1:]
    scores.masked_fill_(scores < least, -torch.inf).div_(DINOV3.temperature)
    torch.softmax(scores, dim=1, out=scores)
    return (scores @ state["labels"].flatten(0, 2)).T.unflatten(1, target.shape[1:])


if __name__ == "__main__":
    sys.exit(main())
