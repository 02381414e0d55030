"""Print how much faster the scores are counted than by a plain restatement of the official way, side by side.

`OMP_NUM_THREADS=1 python benchmarks/scores.py [--repeats 5]`: one process, one thread, both in turn on the same inputs;
exits with 1 where the results differ or a ratio is below its least.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import cv2
import numpy as np
from rows import Row as Told
from rows import machine, tell
from scipy import ndimage
from tabulate import tabulate

from dinoseg.metrics.region_boundary import boundary_radius, object_scores, pair_scores
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


def proposals_row() -> Row:
    frames = [video_frame(number, 5, 20) for number in range(3)]
    return Row(
        what="J and F, 5 objects x 20 proposals, 480 x 854",
        reference=_PAIRS,
        inputs=[(*frame, 5, 20) for frame in frames],
        slow=pair_by_pair,
        fast=all_pairs,
        least=4.0,
    )


def objects_row(what: str, make: Callable[[int], Any], num_objects: int, every: int = 1) -> Row:
    """Compare objects under their ids; `every` 2 takes every second row and column."""
    inputs = [(*(ids[::every, ::every].copy() for ids in make(number)), num_objects) for number in range(3 * every**2)]
    height, width = inputs[0][0].shape
    return Row(
        what=f"J and F, {what}, {num_objects} x {num_objects}, {height} x {width}",
        reference=_PAIRS,
        inputs=inputs,
        slow=same_ids,
        fast=all_objects,
        least=0.7,  # both widen each boundary once, so that only the noise of the clock differs
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


def all_objects(reference: np.ndarray, prediction: np.ndarray, objects: int) -> np.ndarray:
    """Return our J and F (2, G) of the masks of the same id."""
    return np.stack(object_scores(reference, prediction, objects))


def pair_by_pair(reference: np.ndarray, prediction: np.ndarray, objects: int, proposals: int) -> np.ndarray:
    """Return J and F (2, P, G), with both boundaries found and widened anew for each pair."""
    pairs = [
        [_pair(reference == index, prediction == proposal) for index in range(1, objects + 1)]
        for proposal in range(1, proposals + 1)
    ]
    return np.moveaxis(np.array(pairs), -1, 0)


def same_ids(reference: np.ndarray, prediction: np.ndarray, objects: int) -> np.ndarray:
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


def disc_frame(seed: int, radius: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a disc and the same moved by some pixels; the boundary grows with the radius."""
    maps = np.zeros((2, 480, 854), np.uint8)
    for frame, place in zip(maps, ((427, 240), (432 + seed, 237)), strict=True):
        cv2.circle(frame, place, radius, 1, -1)
    return maps[0], maps[1]


def specks_frame(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return one object of two specks in opposite corners, whose box is the whole frame."""
    maps = np.zeros((2, 480, 854), np.uint8)
    maps[0, 2:8, 2:8] = maps[1, 3:9, 4 + seed : 10 + seed] = 1
    maps[0, 470:476, 840:846] = maps[1, 469:475, 838:844] = 1
    return maps[0], maps[1]


def halves_frame(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return two objects that share the frame between them."""
    maps = np.ones((2, 480, 854), np.uint8)
    maps[0, :, 427:] = maps[1, :, 430 + seed :] = 2
    return maps[0], maps[1]


def blocks_frame(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return blocks of 10 x 10 pixels of two objects and background."""
    maps = np.random.default_rng(seed).integers(0, 3, (2, 48, 86), dtype=np.uint8)
    reference, prediction = maps.repeat(10, axis=1).repeat(10, axis=2)[:, :, :854]
    return reference.copy(), prediction.copy()


def noise_frame(seed: int, num_objects: int) -> tuple[np.ndarray, np.ndarray]:
    """Return ids of which every pixel is drawn by itself."""
    maps = np.random.default_rng(seed).integers(0, num_objects + 1, (2, 480, 854), dtype=np.uint8)
    return maps[0], maps[1]


_PAIRS = "every pair by itself, cv2.dilate by a disk"
ROWS: tuple[Callable[[], Row], ...] = (
    surface_row,
    proposals_row,
    *(
        partial(objects_row, what, make, num_objects)
        for what, make, num_objects in (
            ("ellipses", partial(video_frame, num_objects=5, num_proposals=5), 5),
            ("ellipses", partial(video_frame, num_objects=2, num_proposals=2), 2),
            ("ellipse", partial(video_frame, num_objects=1, num_proposals=1), 1),
            ("disc of radius 20", partial(disc_frame, radius=20), 1),
            ("disc of radius 120", partial(disc_frame, radius=120), 1),
            ("disc of radius 230", partial(disc_frame, radius=230), 1),
            ("two far specks", specks_frame, 1),
            ("halves", halves_frame, 2),
            ("blocks of 10 pixels", blocks_frame, 2),
            ("noise", partial(noise_frame, num_objects=10), 10),
            ("noise", partial(noise_frame, num_objects=254), 254),
        )
    ),
    *(partial(objects_row, "disc", partial(disc_frame, radius=120), 1, every) for every in (2, 4, 8)),
)


def compare(row: Row, repeats: int) -> dict[str, Any]:
    """Return the medians of both over the repeats, taken in turn, in milliseconds of the processor for each input."""
    equal = all(np.array_equal(row.slow(*given), row.fast(*given)) for given in row.inputs)
    seconds: dict[Callable, list[float]] = {row.slow: [], row.fast: []}
    for _ in range(repeats):
        for count, times in seconds.items():
            start = time.process_time()  # of this process alone: others may be at work
            for given in row.inputs:
                count(*given)
            times.append((time.process_time() - start) / len(row.inputs))
    slow, fast = (statistics.median(times) * 1000 for times in seconds.values())
    return {
        "score": row.what,
        "reference": row.reference,
        "reference ms": f"{slow:.2f}",
        "dinoseg ms": f"{fast:.2f}",
        "ratio": slow / fast,
        "least": row.least,
        "equal": "yes" if equal else "NO",
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="passes over the inputs; their median counts")
    repeats = parser.parse_args().repeats
    cv2.setNumThreads(1)
    results = [compare(make(), repeats) for make in ROWS]
    tell(*(Told(f"{one['score']}, time", one["reference"], one["ratio"], one["least"]) for one in results))
    print(f"{machine(('numpy', 'scipy', 'opencv-python-headless'))}; one process, one thread")
    print(tabulate(results, headers="keys", floatfmt=("", "", ".2f", ".2f", ".1f", ".1f")))
    return 0 if all(one["equal"] == "yes" and one["ratio"] >= one["least"] for one in results) else 1


if __name__ == "__main__":
    sys.exit(main())
