"""What a report tells of an evaluation, collected image by image: exact counts, some logits, a few pictures."""

import heapq
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from dinoseg.core.geometry import LATTICE, lattice
from dinoseg.core.shapes import Batch, SegmentationData
from dinoseg.metrics.boundary_errors import boundary_errors
from dinoseg.report.html.pictures import Shot
from dinoseg.report.overlay import reduced

SHOWN = 6  # best and as many worst images
_LOGITS = 2**22  # numbers that are kept for the calibration, over all images: 16 MiB
_LONGEST = 512  # pixels of a kept picture's longer side


@dataclass
class Collected:
    """Everything of all images, in the order of the data set.

    Args:
        classes: (N, 3, K) int64: pixels that are right, of the reference, and predicted, by class.
        boundary: (N, bands, 2) int64, see `boundary_errors`.
        logits: (P, K) float32 at some labelled pixels.
        labels: (P,) uint8 of these.
        best: the best images, best first.
        worst: the worst ones, worst first, none of them among the best.
    """

    classes: np.ndarray
    boundary: np.ndarray
    logits: np.ndarray
    labels: np.ndarray
    best: list[Shot]
    worst: list[Shot]


class Collector:
    """Collects one rank's images; `parts` of all ranks `join` to a `Collected`.

    The memory beside the counts is bounded: a number of pictures and of logits that does not grow with the data.
    """

    def __init__(self, data: SegmentationData, rank: int = 0, world: int = 1) -> None:
        self._data, self._world, self._next = data, world, rank
        per_image = _LOGITS // (len(data.classes) * max(len(data), 1))
        self._kept = min(max(per_image, 1), LATTICE)  # pixels of an image
        self._rows: list[tuple[int, np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []
        self._best: list[tuple[float, int, Shot]] = []
        self._worst: list[tuple[float, int, Shot]] = []

    def add(self, batch: Batch, ids: Tensor, logits: Tensor) -> None:
        """Take a batch, as `evaluate` hands it out."""
        masks, predictions = batch.mask.cpu().numpy(), ids.cpu().numpy()
        sampled, places = logits.cpu().numpy(), lattice((masks.shape[-2], masks.shape[-1]))
        for row, (mask, prediction) in enumerate(zip(masks, predictions, strict=True)):
            counts = class_counts(mask, prediction, len(self._data.classes), self._data.ignore_index)
            boundary = boundary_errors(mask, prediction, self._data.ignore_index)
            kept = _sampled(sampled[row], mask[places], self._data.ignore_index, self._kept)
            self._rows.append((self._next, counts, boundary, *kept))
            self._keep_picture(image_miou(counts), batch.image[row], prediction, mask)
            self._next += self._world

    @property
    def parts(self) -> list[tuple[list, list[Shot]]]:
        """What this rank has: one entry, to be gathered."""
        shots = {index: shot for heap in (self._best, self._worst) for _, index, shot in heap}
        return [(self._rows, list(shots.values()))]

    def _keep_picture(self, score: float | None, image: Tensor, prediction: np.ndarray, mask: np.ndarray) -> None:
        if score is None:
            return
        # of equal scores the earlier image is kept, in whichever rank it is
        entries = [(self._best, (score, -self._next)), (self._worst, (-score, -self._next))]
        wanting = [(heap, key) for heap, key in entries if len(heap) < SHOWN or key > heap[0][:2]]
        if not wanting:
            return
        frame: np.ndarray = image.permute(1, 2, 0).cpu().numpy()
        shot = Shot(self._next, score, *(np.array(reduced(each, _LONGEST)) for each in (frame, prediction, mask)))
        for heap, key in wanting:
            heapq.heappush(heap, (*key, shot))
            if len(heap) > SHOWN:
                heapq.heappop(heap)


def join(parts: Iterable[tuple[list, list[Shot]]]) -> Collected:
    """Return what all ranks have collected."""
    parts = list(parts)
    rows = sorted((row for rows, _ in parts for row in rows), key=lambda row: row[0])
    shots = list({shot.index: shot for _, shots in parts for shot in shots}.values())
    best = sorted(shots, key=lambda shot: (-shot.score, shot.index))[:SHOWN]
    worst = sorted(shots, key=lambda shot: (shot.score, shot.index))[:SHOWN]
    # of few images, or few that differ, each is shown once: the better half as best ones
    shown = {shot.index: shot for shot in (*best, *worst)}
    if len(shown) < 2 * SHOWN:
        order, half = sorted(shown.values(), key=lambda shot: (-shot.score, shot.index)), (len(shown) + 1) // 2
        best, worst = order[:half], sorted(order[half:], key=lambda shot: (shot.score, shot.index))
    return Collected(
        classes=np.stack([row[1] for row in rows]),
        boundary=np.stack([row[2] for row in rows]),
        logits=np.concatenate([row[3] for row in rows]),
        labels=np.concatenate([row[4] for row in rows]),
        best=best,
        worst=worst,
    )


def class_counts(mask: np.ndarray, prediction: np.ndarray, num_classes: int, ignore_index: int) -> np.ndarray:
    """Return an image's pixels that are right, of the reference, and predicted where labelled: (3, K) int64.

    Predictions of the class `ignore_index`, if there is one, are not counted: it can never be right, so it is absent.
    """
    labelled = mask != ignore_index
    reference, predicted = mask[labelled], prediction[labelled]
    parts = (reference[reference == predicted], reference, predicted[predicted != ignore_index])
    return np.stack([np.bincount(ids, minlength=num_classes)[:num_classes] for ids in parts]).astype(np.int64)


def class_ious(counts: np.ndarray) -> np.ndarray:
    """Return the IoU (..., K) of counts (..., 3, K); nan where a class is in neither mask."""
    right, reference, predicted = np.moveaxis(counts.astype(np.float64), -2, 0)
    union = reference + predicted - right
    return np.divide(right, union, out=np.full(union.shape, np.nan), where=union > 0)


def image_miou(counts: np.ndarray) -> float | None:
    """Return the mean IoU of counts (3, K) over the classes in either mask; None where nothing is labelled."""
    ious = class_ious(counts)
    defined = ious[~np.isnan(ious)]
    return float(defined.mean()) if len(defined) else None


def image_mious(counts: np.ndarray) -> list[float | None]:
    """Return `image_miou` of each image's counts (N, 3, K)."""
    return [image_miou(each) for each in counts]


def _sampled(logits: np.ndarray, labels: np.ndarray, ignore_index: int, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Return logits (P, K) and labels (P,) of at most so many labelled points of a lattice, evenly chosen."""
    flat = labels.ravel()
    places = np.flatnonzero(flat != ignore_index)
    if len(places) > most:
        places = places[np.linspace(0, len(places) - 1, most).round().astype(np.int64)]
    return logits.reshape(len(logits), -1).T[places].copy(), flat[places].copy()
