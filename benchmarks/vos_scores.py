"""Print how much faster folders of masks are scored by J and F than by vos-benchmark, at equal processes.

`python benchmarks/vos_scores.py [--videos 8] [--frames 30] [--objects 3] [--processes 1 2] [--repeats 3]`: drawn masks
of 480 x 854 with ragged outlines, and the same moved by some pixels as predictions, as PNG files in the layout of
DAVIS-2017. Each way from the folders to the scores, in turns, the least of the repeats, by the clock; Python and its
libraries are there before. Exits with 1 where J or F differ by more than 1e-6. vos-benchmark is needed for this script
alone (`pip install vos-benchmark scikit-image`), which says so where it is missing.

No object is hidden here, since both would differ: by DAVIS's definition the objects are those of the first frame, each
scored in all frames but the first and the last, where one that neither mask has is right (J = F = 1). vos-benchmark
knows an object from the first scored frame that shows it on, in either mask, and leaves out one that no scored
reference shows.
"""

import argparse
import contextlib
import importlib.util
import io
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from rows import Row, machine, tell
from tabulate import tabulate

from dinoseg.extensions.protocols.davis import Davis2017
from dinoseg.extensions.protocols.folders import score_cases
from dinoseg.utils.images import write_png

SIZE = (480, 854)
REFERENCE = "vos-benchmark"
MISSING = "vos-benchmark is not installed: pip install vos-benchmark scikit-image"
Scores = tuple[float, float]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--videos", type=int, default=8)
    parser.add_argument("--frames", type=int, default=30)
    parser.add_argument("--objects", type=int, default=3)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    what = f"J and F of folders, {args.objects} objects, {SIZE[0]} x {SIZE[1]}"
    if importlib.util.find_spec("vos_benchmark") is None:
        print(MISSING)
        tell(Row(f"{what}, time", REFERENCE, None, skipped=MISSING))
        return 0
    rows, differ = [], False
    with tempfile.TemporaryDirectory() as folder:
        root, predicted = Path(folder) / "davis", Path(folder) / "predicted"
        draw(root, predicted, args)
        for processes in args.processes:
            ways: dict[str, Callable[[], Scores]] = {
                REFERENCE: partial(theirs, root, predicted, processes),
                "dinoseg": partial(ours, root, predicted, processes),
            }
            seconds, scores = in_turns(ways, args.repeats)
            ratio = seconds[REFERENCE] / seconds["dinoseg"]
            rows.append((processes, seconds[REFERENCE], seconds["dinoseg"], ratio, *scores["dinoseg"]))
            differ |= not np.allclose(scores[REFERENCE], scores["dinoseg"], rtol=0, atol=1e-6)
            tell(Row(f"{what}, processes: {processes}, time", REFERENCE, ratio))
    print(tabulate(rows, ("processes", f"{REFERENCE} s", "dinoseg s", "times faster", "J", "F"), floatfmt=".3g"))
    print(f"{args.videos} videos of {args.frames} frames; same scores: {not differ}; ", end="")
    print(machine(("numpy", "opencv-python-headless", "pillow", "vos-benchmark")))
    return int(differ)


def in_turns(ways: dict[str, Callable[[], Scores]], repeats: int) -> tuple[dict[str, float], dict[str, Scores]]:
    """Return the least seconds of each way, and its scores."""
    seconds, scores = dict.fromkeys(ways, float("inf")), {}
    for _ in range(repeats):
        for name, way in ways.items():
            start = time.perf_counter()
            scores[name] = way()
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    return seconds, scores


def theirs(root: Path, predicted: Path, processes: int) -> Scores:
    from vos_benchmark.benchmark import benchmark

    _, j, f, _ = benchmark([str(root / "Annotations/480p")], [str(predicted)], num_processes=processes, verbose=False)
    return float(j[0]) / 100, float(f[0]) / 100


def ours(root: Path, predicted: Path, processes: int) -> Scores:
    protocol = Davis2017()
    with contextlib.redirect_stderr(io.StringIO()):
        scored = score_cases(protocol, protocol.find(root, predicted), where=str(root), workers=processes)
    scores = protocol.scores(scored.total)
    return float(scores["J-Mean"]), float(scores["F-Mean"])


def draw(root: Path, predicted: Path, args: argparse.Namespace) -> None:
    """Write masks of objects that drift, the list of the videos, and predictions."""
    chance = np.random.default_rng(0)
    names = [f"video{number}" for number in range(args.videos)]
    (root / "ImageSets/2017").mkdir(parents=True)
    (root / "ImageSets/2017/val.txt").write_text("".join(f"{name}\n" for name in names))
    rough = cv2.resize(chance.normal(0, 10, (60, 107)).astype(np.float32), SIZE[::-1], interpolation=cv2.INTER_CUBIC)
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    for name in names:
        across = (np.arange(args.objects) + 0.5) / args.objects * SIZE[1]  # none hides another
        radii = chance.uniform(0.3, 0.4, args.objects) * min(SIZE[1] / args.objects, SIZE[0])
        for frame in range(args.frames):
            mask = np.zeros(SIZE, np.uint8)
            for number, (left, radius) in enumerate(zip(across, radii, strict=True), 1):
                mask[np.hypot(y - SIZE[0] / 2 - frame, x - left) < radius + rough] = number
            write_png(root / "Annotations/480p" / name / f"{frame:05d}.png", mask)
            write_png(predicted / name / f"{frame:05d}.png", np.roll(mask, chance.integers(-9, 10, 2), (0, 1)))


if __name__ == "__main__":
    sys.exit(main())
