"""Per-image results of an evaluation for its report: exact counts, sampled logits and a few images."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import starmap

import numpy as np
from torch import Tensor

from dinoseg.core.geometry import LATTICE, lattice
from dinoseg.core.metric import LabelledImage, plain_score
from dinoseg.core.objects import Objects
from dinoseg.core.shapes import Batch, SegmentationData
from dinoseg.metrics.miou import MeanIoU, count_classes
from dinoseg.metrics.surface import boundary_errors
from dinoseg.report.html.pictures import ObjectShot, Shot, outline_objects
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
        # sampled pixels per image
        self._samples = min(max(_LOGITS // (len(data.classes) * max(len(data), 1)), 1), LATTICE)
        self._rows: list[tuple[int, np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []
        # the best images, the worst and those with the most errors: a score, minus the index, and values of a shot
        self._shots: dict[str, list[tuple[float, int, tuple]]] = {"best": [], "worst": [], "errors": []}

    def add(self, batch: Batch, ids: Tensor, logits: Tensor) -> None:
        """Add a batch, in the form that `evaluate` passes to `on_batch`."""
        masks = batch.mask.cpu().numpy()
        predictions = ids.cpu().numpy()
        sampled = logits.cpu().numpy()
        places = lattice((masks.shape[-2], masks.shape[-1]))
        for row, (mask, prediction) in enumerate(zip(masks, predictions, strict=True)):
            sample = LabelledImage(mask, len(self._data.classes), self._data.ignore_index)
            counts = count_classes(prediction, sample)  # `evaluate` has checked the ids
            if mask.ndim == 2:
                boundary = boundary_errors(mask, prediction, sample.ignore_index)
                samples = _sample_pixels(sampled[row], mask[places], sample.ignore_index, self._samples)
            else:  # of each layer; without logits, since calibration needs one class per pixel
                pairs = zip(mask, prediction, strict=True)
                boundary = np.sum([boundary_errors(*layers, sample.ignore_index) for layers in pairs], axis=0)
                samples = np.empty((0, len(mask)), np.float32), np.empty(0, np.uint8)
            self._rows.append((self._next, counts, boundary, *samples))
            score = image_mious(counts[None])[0]
            if score is not None:
                make = partial(_make_shot, self._next, score, batch.image[row], prediction, mask)
                self._store("best", score, self._next, make)
                self._store("worst", -score, self._next, make)
            self._next += self._world

    def add_errors(self, index: int, image: Tensor, found: Mapping[str, Objects]) -> None:
        """Add the objects of an image, as `MetricRows` passes them to `on_errors`."""
        errors = len(found["missed"]) + len(found["invented"])
        if errors:
            self._store("errors", errors, index, partial(_make_object_shot, index, image, found))

    def _store(self, name: str, score: float, index: int, make: Callable[[], Shot | ObjectShot]) -> None:
        """Store an image if its score is one of the highest; ties store the earlier image, independent of its rank."""
        shots, key = self._shots[name], (score, -index)
        if len(shots) < SHOWN or key > shots[-1][:2]:
            shots.append((*key, tuple(vars(make()).values())))
            shots.sort(reverse=True)
            del shots[SHOWN:]

    @property
    def parts(self) -> list[tuple[list, dict[str, list]]]:
        """Return this rank's results as a list of one entry, for `Engine.gather`."""
        return [(self._rows, self._shots)]


def join(parts: Iterable[tuple[list, dict[str, list]]]) -> Collected:
    """Merge the results of all ranks."""
    parts = list(parts)
    rows = sorted((row for rows, _ in parts for row in rows), key=lambda row: row[0])

    def select(name: str) -> list[tuple]:
        """Return the values of the shots of the highest scores."""
        found = sorted((shot for _, shots in parts for shot in shots[name]), reverse=True)
        return [values for *_, values in found[:SHOWN]]

    # with few distinct images, show each once: the better half as best
    distinct = {shot.index: shot for shot in starmap(Shot, (*select("best"), *select("worst")))}
    shots, half = [*distinct.values()], (len(distinct) + 1) // 2
    return Collected(
        classes=np.stack([row[1] for row in rows]),
        boundary=np.stack([row[2] for row in rows]),
        logits=np.concatenate([row[3] for row in rows]),
        labels=np.concatenate([row[4] for row in rows]),
        best=shots[:half],
        worst=sorted(shots[half:], key=lambda shot: (shot.score, shot.index)),
        errors=[*starmap(ObjectShot, select("errors"))],
    )


def _make_shot(index: int, score: float, image: Tensor, prediction: np.ndarray, mask: np.ndarray) -> Shot:
    masks = [np.array(downscale_mask(each, _LONGEST)) for each in (prediction, mask)]
    return Shot(index, score, _shrink(image), *masks)


def _make_object_shot(index: int, image: Tensor, found: Mapping[str, Objects]) -> ObjectShot:
    frame = _shrink(image)
    numbers = {name: len(objects) for name, objects in found.items()}
    return ObjectShot(index, numbers, frame, outline_objects(frame, found))


def _shrink(image: Tensor) -> np.ndarray:
    """Return an image (3, H, W) for the page, (h, w, 3) uint8."""
    return np.array(downscale(to_display(image.permute(1, 2, 0).cpu().numpy()), _LONGEST))


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
