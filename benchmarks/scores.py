"""Print how much faster the scores are counted than by a plain restatement of the official way, side by side.

`OMP_NUM_THREADS=1 python benchmarks/scores.py [--repeats 5]`: one process, one thread, both in turn on the same inputs;
exits with 1 where the results differ or a ratio is below its least.
"""

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import scipy
from scipy import ndimage
from tabulate import tabulate

from dinoseg.metrics.davis import boundary_radius, pair_scores
from dinoseg.metrics.surface import surface_dices


@dataclass(frozen=True)
class Row:
    """A comparison: both functions get the same inputs, and give arrays that must be equal to the last bit.

    Args:
        what: the score and the inputs.
        reference: how the reference counts it.
        inputs: arguments of each call; a repeat is one pass over all of them.
        slow: the reference.
        fast: ours.
        least: ratio that has to be reached.
    """

    what: str
    reference: str
    inputs: list[tuple[Any, ...]]
    slow: Callable[..., np.ndarray]
    fast: Callable[..., np.ndarray]
    least: float


def surface_row() -> Row:
    frames = [surgical_frame(number) for number in range(3)]
    return Row(
        what="NSD, SAR-RARP50, 9 classes, 1080 x 1920, tolerance 10",
        reference="whole-image distance transforms, 2 per class",
        inputs=[(reference, prediction, range(1, 10), 10.0) for reference, prediction in frames],
        slow=whole_image_dices,
        fast=surface_dices,
        least=3.0,
    )


def davis_row(what: str, num_objects: int, num_proposals: int, least: float) -> Row:
    frames = [video_frame(number, num_objects, num_proposals) for number in range(3)]
    return Row(
        what=f"J and F, {what}, {num_objects} x {num_proposals}, 480 x 854",
        reference="every pair by itself, cv2.dilate by a disk",
        inputs=[(*frame, num_objects, num_proposals) for frame in frames],
        slow=pair_by_pair if num_proposals > num_objects else same_ids,
        fast=all_pairs if num_proposals > num_objects else all_same_ids,
        least=least,
    )


ROWS = (
    surface_row,
    partial(davis_row, "DAVIS-2017 unsupervised", 5, 20, 4.0),
    partial(davis_row, "DAVIS-2017 semi-supervised", 5, 5, 4.0),
    partial(davis_row, "DAVIS-2017 semi-supervised", 2, 2, 2.0),
    partial(davis_row, "DAVIS-2016", 1, 1, 1.0),
)


def whole_image_dices(reference: np.ndarray, prediction: np.ndarray, classes: range, tolerance: float) -> np.ndarray:
    """Return the NSD of each class with one transform over the whole image for each of the two boundaries."""
    return np.array([_whole_image_dice(reference == label, prediction == label, tolerance) for label in classes])


def _whole_image_dice(reference: np.ndarray, prediction: np.ndarray, tolerance: float) -> float:
    if not reference.any() or not prediction.any():
        return float(reference.any() == prediction.any())
    ours, theirs = (mask & ~ndimage.binary_erosion(mask) for mask in (reference, prediction))
    to_theirs, to_ours = ndimage.distance_transform_edt(~theirs)[ours], ndimage.distance_transform_edt(~ours)[theirs]
    near = np.count_nonzero(to_theirs <= tolerance) + np.count_nonzero(to_ours <= tolerance)
    return near / (len(to_theirs) + len(to_ours))


def surgical_frame(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return reference and prediction (1080, 1920) uint8 of all nine classes: long tools, a thread, a needle's arc.

    The prediction is the reference drawn again with everything shifted by some pixels, and a few false spots.
    """
    rng = np.random.default_rng(seed)
    places = rng.uniform((500, 250), (1400, 800), (10, 2))
    angles = rng.uniform(0, 180, 10)
    thread = np.cumsum(rng.normal(0, 45, (40, 2)), axis=0) + (960, 540)
    pair = []
    for jitter in (0.0, 6.0):
        frame = np.zeros((1080, 1920), np.uint8)
        shifts = rng.normal(0, jitter, (10, 2)) if jitter else np.zeros((10, 2))
        for label, length, width in ((3, 420, 70), (6, 500, 40), (9, 300, 30), (8, 90, 45), (2, 110, 60), (7, 260, 55)):
            _ellipse(frame, places[label] + shifts[label], (length, width), angles[label], label)
        _ellipse(frame, places[2] + 90 + shifts[1], (80, 22), angles[1], 1)
        points = (thread + shifts[5]).round().astype(np.int32)
        cv2.polylines(frame, [points], isClosed=False, color=5, thickness=4)
        centre = (places[4] + shifts[4]).round().astype(int).tolist()
        cv2.ellipse(frame, centre, (70, 70), angles[4], 0, 200, 4, 8)
        if jitter:
            for x, y in rng.integers((0, 0), (1900, 1060), (5, 2)).tolist():
                frame[y : y + 9, x : x + 12] = rng.integers(1, 10)
        pair.append(frame)
    return pair[0], pair[1]


def _ellipse(frame: np.ndarray, centre: np.ndarray, axes: tuple[int, int], angle: float, label: int) -> None:
    cv2.ellipse(frame, centre.round().astype(int).tolist(), axes, float(angle), 0, 360, label, -1)


def all_pairs(reference: np.ndarray, prediction: np.ndarray, objects: int, proposals: int) -> np.ndarray:
    """Return our J and F (2, P, G)."""
    return np.stack(pair_scores(reference, prediction, objects, proposals))


def all_same_ids(reference: np.ndarray, prediction: np.ndarray, objects: int, proposals: int) -> np.ndarray:
    """Return our J and F (2, G) of the masks of the same id."""
    return all_pairs(reference, prediction, objects, proposals).diagonal(axis1=1, axis2=2)


def pair_by_pair(reference: np.ndarray, prediction: np.ndarray, objects: int, proposals: int) -> np.ndarray:
    """Return J and F (2, P, G), with both boundaries found and widened anew for each pair."""
    pairs = [
        [_pair(reference == index, prediction == proposal) for index in range(1, objects + 1)]
        for proposal in range(1, proposals + 1)
    ]
    return np.moveaxis(np.array(pairs), -1, 0)


def same_ids(reference: np.ndarray, prediction: np.ndarray, objects: int, _: int) -> np.ndarray:
    """Return J and F (2, G) of the masks of the same id, each pair by itself."""
    return np.array([_pair(reference == index, prediction == index) for index in range(1, objects + 1)]).T


def _pair(reference: np.ndarray, prediction: np.ndarray) -> tuple[float, float]:
    union = np.sum(reference | prediction)
    region = np.sum(reference & prediction) / union if union else 1.0
    radius = boundary_radius(reference.shape)
    y, x = np.ogrid[-radius : radius + 1, -radius : radius + 1]
    disk = (x**2 + y**2 <= radius**2).astype(np.uint8)
    theirs, ours = _outline(reference), _outline(prediction)
    near_theirs, near_ours = (cv2.dilate(edge.astype(np.uint8), disk) for edge in (theirs, ours))
    if not theirs.any() or not ours.any():
        return region, float(theirs.any() == ours.any())
    precision = np.sum(ours * near_theirs) / np.sum(ours)
    recall = np.sum(theirs * near_ours) / np.sum(theirs)
    return region, 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _outline(mask: np.ndarray) -> np.ndarray:
    """Return where a mask differs from its right, lower or lower-right neighbour within the image."""
    outline = np.zeros_like(mask)
    outline[:, :-1] |= mask[:, :-1] ^ mask[:, 1:]
    outline[:-1] |= mask[:-1] ^ mask[1:]
    outline[:-1, :-1] |= mask[:-1, :-1] ^ mask[1:, 1:]
    return outline


def video_frame(seed: int, num_objects: int, num_proposals: int) -> tuple[np.ndarray, np.ndarray]:
    """Return reference and prediction (480, 854) uint8 of ellipses; the first proposals are the objects, shifted."""
    rng = np.random.default_rng(seed)
    count = max(num_objects, num_proposals)
    places, axes = rng.uniform((80, 60), (780, 420), (count, 2)), rng.integers(15, 110, (count, 2))
    pair = []
    for number, jitter in ((num_objects, 0.0), (num_proposals, 6.0)):
        frame = np.zeros((480, 854), np.uint8)
        for label in range(number, 0, -1):
            centre = places[label - 1] + rng.normal(0, jitter, 2) if jitter else places[label - 1]
            _ellipse(frame, centre, tuple(axes[label - 1].tolist()), 30.0 * label, label)
        pair.append(frame)
    return pair[0], pair[1]


def compare(row: Row, repeats: int) -> dict[str, Any]:
    """Return the medians of both over the repeats, taken in turn, in milliseconds for each input."""
    equal = all(np.array_equal(row.slow(*given), row.fast(*given)) for given in row.inputs)
    seconds: dict[Callable, list[float]] = {row.slow: [], row.fast: []}
    for _ in range(repeats):
        for count, times in seconds.items():
            start = time.perf_counter()
            for given in row.inputs:
                count(*given)
            times.append((time.perf_counter() - start) / len(row.inputs))
    slow, fast = (statistics.median(times) * 1000 for times in seconds.values())
    return {
        "score": row.what,
        "reference": row.reference,
        "reference ms": f"{slow:.1f}",
        "dinoseg ms": f"{fast:.2f}",
        "ratio": slow / fast,
        "least": row.least,
        "equal": "yes" if equal else "NO",
    }


def machine() -> str:
    """Return processor and versions."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (
        f"{names[0] if names else platform.machine()}, Python {platform.python_version()}, numpy {np.__version__}, "
        f"scipy {scipy.__version__}, OpenCV {cv2.__version__}; one process, one thread"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="passes over the inputs; their median counts")
    repeats = parser.parse_args().repeats
    cv2.setNumThreads(1)
    results = [compare(make(), repeats) for make in ROWS]
    print(machine())
    print(tabulate(results, headers="keys", floatfmt=".1f"))
    return 0 if all(one["equal"] == "yes" and one["ratio"] >= one["least"] for one in results) else 1


if __name__ == "__main__":
    sys.exit(main())
