"""Objects of an image, of a reference or predicted: masks as runs, classes and scores; no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from dinoseg.core.object_ids import crowd_flags, object_classes, object_numbers
from dinoseg.core.runs import Runs


@dataclass(frozen=True)
class Objects:
    """Objects of an image, which may overlap; predicted ones are in the order of their scores.

    A panoptic prediction holds the segments of stuff, too, and none of its masks overlap.

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
    masks: Sequence[Runs]
    classes: np.ndarray
    scores: np.ndarray
    areas: np.ndarray
    crowds: np.ndarray

    @classmethod
    def of_runs(
        cls,
        size: tuple[int, int],
        masks: Sequence[Runs],
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
        return cls.of_runs((masks.shape[1], masks.shape[2]), [Runs.of_mask(mask) for mask in masks], classes, scores)

    @classmethod
    def of_map(cls, values: np.ndarray) -> Self:
        """Return the objects of an `ObjectMap` (N, H, W) int32 in the order of their numbers, crowds last."""
        found: dict[int, Runs] = {}
        for layer in values:
            for value in np.unique(layer[layer > 0]).tolist():
                found[value] = Runs.of_mask(layer == value)
        codes = np.array(sorted(found, key=lambda value: (crowd_flags(value), object_numbers(value))), np.int64)
        masks = [found[value] for value in codes.tolist()]
        size = (values.shape[1], values.shape[2])
        return cls.of_runs(size, masks, object_classes(codes), crowds=crowd_flags(codes) == 1)

    def __len__(self) -> int:
        return len(self.masks)

    @property
    def boxes(self) -> np.ndarray:
        """The boxes (N, 4) int64 as left, top, width and height in pixels; of an empty mask, zeros."""
        height = self.size[0]
        boxes = np.zeros((len(self), 4), np.int64)
        for box, mask in zip(boxes, self.masks, strict=True):
            pixels = mask.pixels()
            if pixels.size:
                columns, rows = pixels // height, pixels % height
                left, top = columns.min(), rows.min()
                box[:] = left, top, columns.max() - left + 1, rows.max() - top + 1
        return boxes

    def sort_by_score(self) -> "Objects":
        """Return the objects that have pixels, those of the highest scores first; equal scores stay in order."""
        order = np.argsort(-self.scores, kind="stable")
        return self.select(order[self.areas[order] > 0])

    def select(self, places: Sequence[int] | np.ndarray) -> "Objects":
        """Return the objects at some places, in their order."""
        kept = np.asarray(places, np.int64)
        masks = [self.masks[place] for place in kept.tolist()]
        return Objects(self.size, masks, self.classes[kept], self.scores[kept], self.areas[kept], self.crowds[kept])
