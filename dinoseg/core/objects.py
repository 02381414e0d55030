"""Objects of an image, of a reference or predicted: masks as runs, classes and scores; no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np

from dinoseg.core.object_ids import crowd_flags, object_classes, object_numbers

MIN_SCORE = 0.5  # of shown and counted objects: those of lower scores are mostly wrong, and would hide the others


class RunLengths(NamedTuple):
    """Runs of ones of a mask (H, W) whose columns follow one another, as in COCO's run lengths.

    Attributes:
        starts: (R,) int64, first pixel of each run, ascending.
        ends: (R,) int64, the pixel after each run; runs do not overlap, and may be empty.
    """

    starts: np.ndarray
    ends: np.ndarray

    @classmethod
    def of_mask(cls, mask: np.ndarray) -> Self:
        """Return the runs of a mask (H, W) bool."""
        return cls.of_ids(np.asarray(mask, bool)).get(1, cls.of_counts(np.zeros(0, np.int64)))

    @classmethod
    def of_counts(cls, counts: np.ndarray) -> Self:
        """Return the runs of run lengths (N,), of zeros first."""
        bounds = np.cumsum(counts)
        ends = bounds[1::2]
        return cls(bounds[::2][: len(ends)], ends)

    @classmethod
    def of_ids(cls, ids: np.ndarray) -> dict[int, Self]:
        """Return the runs of each id of a map (H, W) of whole numbers, in ascending order; 0 is none."""
        flat = ids.T.ravel()
        if not flat.size:
            return {}
        # one pass over the map for all ids: a comparison for each id would read it N times
        starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1])
        ends = np.append(starts[1:], flat.size)
        # stable: the runs of each id remain ascending
        order = np.argsort(flat[starts], kind="stable")
        found, first = np.unique(flat[starts][order], return_index=True)
        groups = zip(found.tolist(), np.split(order, first[1:]), strict=True)
        return {value: cls(starts[group], ends[group]) for value, group in groups if value}

    @property
    def area(self) -> int:
        """Number of pixels."""
        return int((self.ends - self.starts).sum())

    def paint(self, canvas: np.ndarray, value: object) -> None:
        """Set the pixels of a canvas (H, W) where the mask is 1."""
        first, mask = self.to_columns(len(canvas))
        # by columns, in which the mask lies in memory
        canvas[:, first : first + mask.shape[1]].swapaxes(0, 1)[mask.T] = value

    def to_counts(self, pixels: int) -> np.ndarray:
        """Return the run lengths (N,) int64 of a mask with a number of pixels, of zeros first."""
        bounds = np.stack([self.starts, self.ends], axis=1).ravel()
        counts = np.diff(np.concatenate([[0], bounds, [pixels]]))
        # COCO's run lengths have no last count of 0
        return counts if counts[-1] else counts[:-1]

    def to_columns(self, height: int) -> tuple[int, np.ndarray]:
        """Return the first column with a pixel, and the mask (H, w) bool from there to the last one; w is 0 of none.

        Most objects of an image are small: the whole mask of each of thousands would take seconds.
        """
        is_used = self.ends > self.starts
        starts, ends = self.starts[is_used], self.ends[is_used]
        if not starts.size:
            return 0, np.zeros((height, 0), bool)
        first = int(starts[0]) // height
        last = int(ends[-1] - 1) // height
        return first, RunLengths(starts - first * height, ends - first * height).to_mask((height, last - first + 1))

    def count_within(self, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Return how many ones (M,) of the mask lie in each of M runs from `starts` to `ends`."""
        return self._count_before(ends) - self._count_before(starts)

    def _count_before(self, places: np.ndarray) -> np.ndarray:
        """Return how many ones (M,) of the mask lie before each place (M,)."""
        begun = np.searchsorted(self.starts, places, side="right")  # runs that start before or at the place
        pixels = np.concatenate([[0], np.cumsum(self.ends - self.starts)])
        last_end = np.concatenate([[0], self.ends])[begun]
        return pixels[begun] - np.maximum(last_end - places, 0)

    @classmethod
    def union(cls, masks: Sequence["RunLengths"]) -> "RunLengths":
        """Return the runs of the pixels of any of the masks."""
        starts, ends = (np.concatenate([np.zeros(0, np.int64), *(mask[side] for mask in masks)]) for side in (0, 1))
        order = np.argsort(starts, kind="stable")
        order = order[ends[order] > starts[order]]
        starts, ends = starts[order], np.maximum.accumulate(ends[order])
        is_first = np.append(True, starts[1:] > ends[:-1])[: len(starts)]
        return cls(starts[is_first], ends[np.append(is_first[1:], True)[: len(starts)]])

    def to_mask(self, size: tuple[int, int]) -> np.ndarray:
        """Return the mask (H, W) bool of `size` (H, W)."""
        counts = self.to_counts(size[0] * size[1])
        return np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(size[1], size[0]).T


@dataclass(frozen=True)
class Objects:
    """Objects of an image, which may overlap; predicted ones are in the order of their scores.

    A panoptic prediction holds the segments of stuff, too, and its masks do not overlap.

    Args:
        size: (H, W) of the image.
        masks: of each of N objects.
        classes: (N,) int64, 0..K-1.
        scores: (N,) float64 of predicted objects, 0..1; 1 of a reference.
        areas: (N,) float64 pixels; of COCO's JSON, by its entry.
        crowds: (N,) bool, whether one is an area of many objects; of references.

    Examples:
        >>> import numpy as np
        >>> from dinoseg.core.objects import Objects
        >>> objects = Objects.of_masks(np.array([[[False, True], [True, True]]]), classes=[2], scores=[0.9])
        >>> objects.areas.tolist(), objects.boxes.tolist()
        ([3.0], [[0, 0, 2, 2]])
    """

    size: tuple[int, int]
    masks: Sequence[RunLengths]
    classes: np.ndarray
    scores: np.ndarray
    areas: np.ndarray
    crowds: np.ndarray

    @classmethod
    def of_runs(
        cls,
        size: tuple[int, int],
        masks: Sequence[RunLengths],
        classes: Sequence[int] | np.ndarray,
        scores: Sequence[float] | np.ndarray | None = None,
        crowds: Sequence[bool] | np.ndarray | None = None,
    ) -> Self:
        """Return objects of masks, whose areas are those of their pixels; by default scores of 1 and no crowds."""
        count = len(masks)
        return cls(
            size,
            masks,
            np.asarray(classes, np.int64).reshape(count),
            np.ones(count) if scores is None else np.asarray(scores, np.float64).reshape(count),
            np.array([mask.area for mask in masks], np.float64),
            np.zeros(count, bool) if crowds is None else np.asarray(crowds, bool).reshape(count),
        )

    @classmethod
    def of_masks(
        cls, masks: np.ndarray, classes: Sequence[int] | np.ndarray, scores: Sequence[float] | np.ndarray | None = None
    ) -> Self:
        """Return objects of masks (N, H, W) bool."""
        return cls.of_runs(
            (masks.shape[1], masks.shape[2]), [RunLengths.of_mask(mask) for mask in masks], classes, scores
        )

    @classmethod
    def of_map(cls, values: np.ndarray) -> Self:
        """Return the objects of an `ObjectMap` (N, H, W) int32 in the order of their numbers, crowds last."""
        found: dict[int, RunLengths] = {}
        for layer in values:
            found |= RunLengths.of_ids(layer)
        codes = np.array(sorted(found, key=lambda value: (crowd_flags(value), object_numbers(value))), np.int64)
        masks = [found[value] for value in codes.tolist()]
        return cls.of_runs(values.shape[1:], masks, object_classes(codes), crowds=crowd_flags(codes) == 1)

    def __len__(self) -> int:
        return len(self.masks)

    @property
    def boxes(self) -> np.ndarray:
        """The boxes (N, 4) int64 as left, top, width and height in pixels; of an empty mask, zeros."""
        boxes = np.zeros((len(self), 4), np.int64)
        for box, mask in zip(boxes, self.masks, strict=True):
            is_used = mask.ends > mask.starts
            columns, rows = np.divmod([mask.starts[is_used], mask.ends[is_used] - 1], self.size[0])
            if rows.size:
                if (columns[0] < columns[1]).any():  # a run that continues in the next column touches both borders
                    rows = np.array([0, self.size[0] - 1])
                box[:] = columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1
        return boxes

    def sort_by_score(self) -> "Objects":
        """Return the objects that have pixels, those of the highest scores first; equal scores stay in order."""
        order = np.argsort(-self.scores, kind="stable")
        return self.select(order[self.areas[order] > 0])

    def select_distinct(self, minimum: float = MIN_SCORE) -> "Objects":
        """Return the objects of at least a score without duplicates, in their order.

        In the order of scores, an object is a duplicate if more than half of it lies in those of its class that are
        not: several queries of a model often find the same object. So is a true object inside another one of its class.
        """
        sure = self.select(np.flatnonzero(self.scores >= minimum))
        covered: dict[int, RunLengths] = {}
        kept = []
        for place in np.argsort(-sure.scores, kind="stable").tolist():
            label, mask = int(sure.classes[place]), sure.masks[place]
            others = covered.get(label)
            if others is None:
                covered[label] = mask
            elif 2 * int(others.count_within(*mask).sum()) <= mask.area:
                covered[label] = RunLengths.union([others, mask])
            else:
                continue
            kept.append(place)
        return sure.select(sorted(kept))

    def select(self, places: Sequence[int] | np.ndarray) -> "Objects":
        """Return the objects at some places, in their order."""
        kept = np.asarray(places, np.int64)
        masks = [self.masks[place] for place in kept.tolist()]
        return Objects(self.size, masks, self.classes[kept], self.scores[kept], self.areas[kept], self.crowds[kept])
