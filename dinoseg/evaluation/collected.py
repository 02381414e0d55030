"""Per-image results of an evaluation for its report: exact counts, sampled logits and a few images."""

import heapq
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import starmap

import numpy as np
from torch import Tensor

from dinoseg.core.geometry import LATTICE, lattice
from dinoseg.core.metric import Counts, LabelledImage, plain_score
from dinoseg.core.shapes import Batch, SegmentationData
from dinoseg.metrics.miou import MeanIoU, count_classes
from dinoseg.metrics.surface import boundary_errors
from dinoseg.report.html.pictures import OUTLINES, ObjectShot, Shot, mark_pixels
from dinoseg.report.overlay import downscale, downscale_mask
from dinoseg.utils.levels import to_display

SHOWN = 6  # number of best images, and of worst images
_LOGITS = 2**22  # logit values stored for the calibration, over all images: 16 MiB
_LONGEST = 512  # pixels of a stored image's longer side


@dataclass
class Collected:
    """Results of all images, in the order of the data set.

    Args:
        classes: (N, 3, K) int64: correct, reference and predicted pixels by class; of layers (N, 4, K), see `MeanIoU`.
        boundary: (N, bands, 2) int64, see `boundary_errors`.
        logits: (P, K) float32 at sampled labelled pixels.
        labels: (P,) uint8, reference classes of these pixels.
        best: the best images, best first.
        worst: the worst images, worst first, disjoint from `best`.
        errors: images with the most objects that are missed or invented, most first.
    """

    classes: np.ndarray
    boundary: np.ndarray
    logits: np.ndarray
    labels: np.ndarray
    best: list[Shot]
    worst: list[Shot]
    errors: list[ObjectShot]


class Collector:
    """Collects the results of one rank's images; `join` merges the `parts` of all ranks into a `Collected`.

    Besides the counts, memory is limited to a fixed number of images and to about `_LOGITS` logit values. Each image
    adds at least one pixel's logits, so more than `_LOGITS` / K images exceed that limit.
    """

    def __init__(self, data: SegmentationData, rank: int = 0, world_size: int = 1) -> None:
        self._data, self._world, self._next = data, world_size, rank
        per_image = _LOGITS // (len(data.classes) * max(len(data), 1))
        self._samples = min(max(per_image, 1), LATTICE)  # sampled pixels per image
        self._rows: list[tuple[int, np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []
        self._best: list[tuple[float, int, Shot]] = []
        self._worst: list[tuple[float, int, Shot]] = []
        self._errors: list[tuple[int, int, ObjectShot]] = []

    def add(self, batch: Batch, ids: Tensor, logits: Tensor) -> None:
        """Add a batch, in the form that `evaluate` passes to `on_batch`."""
        masks = batch.mask.cpu().numpy()
        predictions = ids.cpu().numpy()
        sampled = logits.cpu().numpy()
        places = lattice((masks.shape[-2], masks.shape[-1]))
        for row, (mask, prediction) in enumerate(zip(masks, predictions, strict=True)):
            sample = LabelledImage(mask, len(self._data.classes), self._data.ignore_index)
            counts = count_classes(prediction, sample)  # `evaluate` has checked the ids
            ignored = self._data.ignore_index
            if mask.ndim == 2:
                boundary = boundary_errors(mask, prediction, ignored)
                samples = _sample_pixels(sampled[row], mask[places], ignored, self._samples)
            else:  # of each layer; without logits, since calibration needs one class per pixel
                pairs = zip(mask, prediction, strict=True)
                boundary = np.stack([boundary_errors(*layers, ignored) for layers in pairs]).sum(axis=0)
                samples = np.empty((0, len(mask)), np.float32), np.empty(0, np.uint8)
            self._rows.append((self._next, counts, boundary, *samples))
            self._store_image(image_mious(counts[None])[0], batch.image[row], prediction, mask)
            self._next += self._world

    def add_errors(
        self, index: int, image: Tensor, counts: Counts, draw: Callable[[np.ndarray, Mapping[str, tuple]], None]
    ) -> None:
        """Add the objects of an image, as `MetricRows` passes them to `on_errors`."""
        numbers = {name: int(each.sum()) for name, each in counts.items()}
        errors = numbers["missed"] + numbers["invented"]
        key = errors, -index  # ties store the earlier image, independent of its rank
        if not errors or (len(self._errors) == SHOWN and key < self._errors[0][:2]):
            return
        frame = np.array(downscale(to_display(image.permute(1, 2, 0).cpu().numpy()), _LONGEST))
        outlines = mark_pixels(frame, [])
        draw(outlines, OUTLINES)
        shot = ObjectShot(index, numbers, frame, outlines)
        heapq.heappush(self._errors, (*key, shot))
        if len(self._errors) > SHOWN:
            heapq.heappop(self._errors)

    @property
    def parts(self) -> list[tuple[list, list[tuple], list[tuple]]]:
        """Return this rank's results as a list of one entry, for `Engine.gather`."""
        shots = {index: shot for heap in (self._best, self._worst) for _, index, shot in heap}
        errors = [tuple(vars(shot).values()) for _, _, shot in self._errors]
        return [(self._rows, [tuple(vars(shot).values()) for shot in shots.values()], errors)]

    def _store_image(self, score: float | None, image: Tensor, prediction: np.ndarray, mask: np.ndarray) -> None:
        if score is None:
            return
        # ties store the earlier image, independent of its rank
        entries = [(self._best, (score, -self._next)), (self._worst, (-score, -self._next))]
        wanting = [(heap, key) for heap, key in entries if len(heap) < SHOWN or key > heap[0][:2]]
        if not wanting:
            return
        frame = to_display(image.permute(1, 2, 0).cpu().numpy())
        masks = [np.array(downscale_mask(each, _LONGEST)) for each in (prediction, mask)]
        shot = Shot(self._next, score, np.array(downscale(frame, _LONGEST)), *masks)
        for heap, key in wanting:
            heapq.heappush(heap, (*key, shot))
            if len(heap) > SHOWN:
                heapq.heappop(heap)


def join(parts: Iterable[tuple[list, list[tuple], list[tuple]]]) -> Collected:
    """Merge the results of all ranks."""
    parts = list(parts)
    rows = sorted((row for rows, _, _ in parts for row in rows), key=lambda row: row[0])
    shots = list({shot.index: shot for _, shots, _ in parts for shot in starmap(Shot, shots)}.values())
    errors = [ObjectShot(*shot) for _, _, shots in parts for shot in shots]
    best = sorted(shots, key=lambda shot: (-shot.score, shot.index))[:SHOWN]
    worst = sorted(shots, key=lambda shot: (shot.score, shot.index))[:SHOWN]
    # with few distinct images, show each once: the better half as best
    distinct = {shot.index: shot for shot in (*best, *worst)}
    if len(distinct) < 2 * SHOWN:
        order, half = sorted(distinct.values(), key=lambda shot: (-shot.score, shot.index)), (len(distinct) + 1) // 2
        best, worst = order[:half], sorted(order[half:], key=lambda shot: (shot.score, shot.index))
    return Collected(
        classes=np.stack([row[1] for row in rows]),
        boundary=np.stack([row[2] for row in rows]),
        logits=np.concatenate([row[3] for row in rows]),
        labels=np.concatenate([row[4] for row in rows]),
        best=best,
        worst=worst,
        errors=sorted(errors, key=lambda shot: (-shot.errors, shot.index))[:SHOWN],
    )


def image_mious(counts: np.ndarray) -> list[float | None]:
    """Return the mean IoU of each image from counts (N, 3 or 4, K) of `MeanIoU`; None without labelled pixels."""
    return [plain_score(miou) for miou in MeanIoU().compute({"classes": counts})["miou"]]


def _sample_pixels(
    logits: np.ndarray, labels: np.ndarray, ignore_index: int, most: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return logits (P, K) and labels (P,) of at most `most` labelled lattice points, evenly spaced."""
    flat = labels.ravel()
    places = np.flatnonzero(flat != ignore_index)
    if len(places) > most:
        places = places[np.linspace(0, len(places) - 1, most).round().astype(np.int64)]
    return logits.reshape(len(logits), -1).T[places].copy(), flat[places].copy()
