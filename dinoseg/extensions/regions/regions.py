"""Removal of small connected regions from predictions, as a strategy around another one."""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
import torch
from torch import Tensor

from dinoseg.core.class_ids import argmax_ids
from dinoseg.core.geometry import upsample
from dinoseg.core.shapes import Prediction
from dinoseg.inference.memory import OutOfMemory, describe_images, free_bytes
from dinoseg.inference.rows import Rows
from dinoseg.inference.strategy import Autocast, InferenceStrategy, OnPass
from dinoseg.models.model import SegmentationModel, Size
from dinoseg.utils.errors import UserError
from dinoseg.utils.ranges import Range
from dinoseg.utils.wording import in_bytes, join_names

MinRegion = Annotated[int, Range("a whole number of pixels from 0 to 2147483647", 0, 2**31 - 1)]
_REMOVED = torch.finfo(torch.float32).min  # logit of a removed class, whose probability becomes 0
_BYTES = 20  # of memory per class and pixel: logits, the bands that they are joined from, and results


def with_regions(
    strategy: InferenceStrategy,
    classes: Sequence[str],
    min_region: MinRegion,
    largest_component: Sequence[str],
) -> InferenceStrategy:
    """Return a strategy that removes regions, see `Regions`; the given one if there is nothing to remove.

    Args:
        strategy: predicts the images.
        classes: names of the model's classes, in the order of their IDs.
        min_region: pixels of the smallest region that stays; 0 and 1 remove none.
        largest_component: names of classes whose largest region alone stays.

    Raises:
        UserError: a name is not one of the classes.
    """
    unknown = [name for name in largest_component if name not in classes]
    if unknown:
        raise UserError(
            f"inference.largest_component: the model has no class {join_names(unknown)}. Its classes are "
            f"{join_names(classes)}."
        )
    if min_region < 2 and not largest_component:
        return strategy
    return Regions(strategy, min_region, tuple(sorted({list(classes).index(name) for name in largest_component})))


@dataclass(eq=False)
class Regions(InferenceStrategy):
    """Strategy that holds the prediction of whole images and removes connected regions of a class from it.

    Pixels of a class are connected with their 8 neighbours, at the predicted size. A region is removed if it has fewer
    than `min_region` pixels, or belongs to a class of `largest` and is not the largest region of it. Every class
    counts, the background too, so that small holes are filled.

    Where each pixel has one class, the pixels of removed regions take their most probable class but the removed one.
    Regions that arise are checked again, at most K - 1 times, with all classes excluded that a pixel has had. A pixel
    for which no class is left gets its first class back. Of layers, removed pixels are 0, and holes stay.

    Args:
        strategy: predicts the images.
        min_region: pixels.
        largest: class IDs. The largest region is determined when the class first occurs, usually before pixels change
            their class; of several equally large regions it is the one with the first pixel in reading order.

    Attributes:
        original: class IDs (B, H, W) or layers (B, K, H, W) of the last images, before regions were removed.
    """

    strategy: InferenceStrategy = field(repr=False)
    min_region: int = 0
    largest: Collection[int] = ()
    original: Tensor = field(init=False, repr=False)

    @property
    def base(self) -> InferenceStrategy:
        """The strategy that predicts the images."""
        return self.strategy

    def around(self, base: InferenceStrategy) -> "Regions":
        """Return a strategy that removes the same regions from the predictions of another one."""
        return Regions(base, self.min_region, self.largest)

    def bands(
        self,
        model: SegmentationModel,
        rows: Rows,
        autocast: Autocast,
        *,
        size: Size | None = None,
        on_pass: OnPass | None = None,
    ) -> Iterator[Prediction]:
        """Yield the prediction of the whole images as one band.

        Raises:
            OutOfMemory: memory does not suffice for the class scores of the whole images.
        """
        size = size or rows.size
        needed = _BYTES * rows.count * (model.num_classes or 0) * math.prod(size)
        free = free_bytes(rows.read(0, 1).device)
        if needed > free:
            raise OutOfMemory(
                f"Removing regions of {describe_images(rows)} holds the scores of all classes, which needs "
                f"{in_bytes(needed)} of memory, and {in_bytes(free)} are free. Free some, split or reduce the image, "
                "or set inference.min_region=0 inference.largest_component=[]."
            )
        bands = self.strategy.bands(model, rows, autocast, size=size, on_pass=on_pass)
        # a band is valid only until the next one
        logits = torch.cat([band.logits().to(torch.float32, copy=True) for band in bands], dim=2)
        prediction = Prediction(logits, size, (1.0, 1.0), upsample, task=model.task)
        self.original = prediction.class_ids()
        for of_image, ids in zip(logits, self.original.cpu().numpy(), strict=True):
            self._remove(of_image.flatten(1), ids.copy())
        yield prediction

    @property
    def no_objects_reason(self) -> str:
        """Why it predicts no single objects."""
        return (
            "inference.min_region and inference.largest_component remove regions of the classes of pixels, and objects "
            "would keep them. Set inference.min_region=0 inference.largest_component=[]."
        )

    def reduce_memory(self, model: SegmentationModel, rows: Rows, *, size: Size | None = None) -> bool:
        """Let the inner strategy use less memory; return whether it can."""
        return self.strategy.reduce_memory(model, rows, size=size)

    def _remove(self, logits: Tensor, ids: np.ndarray) -> None:
        """Edit an image's logits (K, H * W) so that they predict no removed region of its ids (H, W) or layers."""
        first_pixels: dict[int, tuple[int, int]] = {}
        if ids.ndim > 2:
            for label, layer in enumerate(ids):
                logits[label, self._find(layer, label, first_pixels)] = _REMOVED
            return
        flat = ids.reshape(-1)  # a view
        initial = removed = self._find_all(ids, np.unique(ids).tolist(), first_pixels)
        before = logits[:, initial]
        # a region that stays only grows, so later rounds concern pixels that have just changed
        for _ in range(len(logits) - 1):
            if not len(removed):
                return
            logits[flat[removed].astype(np.int64), removed] = _REMOVED  # uint8 would index as a mask
            flat[removed] = argmax_ids(logits[None, :, removed])[0].cpu().numpy()
            removed = self._find_all(ids, np.unique(flat[removed]).tolist(), first_pixels)
        logits[:, removed] = before[:, np.searchsorted(initial, removed)]

    def _find_all(self, ids: np.ndarray, labels: Sequence[int], first_pixels: dict[int, tuple[int, int]]) -> np.ndarray:
        """Return the sorted flat positions of the pixels of some classes that are in removed regions."""
        found = [self._find((ids == label).view(np.uint8), label, first_pixels) for label in labels]
        return np.sort(np.concatenate(found))

    def _find(self, mask: np.ndarray, label: int, first_pixels: dict[int, tuple[int, int]]) -> np.ndarray:
        """Return the sorted flat positions of the pixels of a class's mask (H, W) that are in removed regions.

        `first_pixels` gets a pixel of the largest region, so that later calls for the image recognise it.
        """
        import cv2  # lazy import: a training without regions needs no OpenCV

        left, top, columns, rows = cv2.boundingRect(mask)
        if not rows:
            return np.empty(0, np.int64)
        # a small class costs no more than its box
        _, regions = cv2.connectedComponents(mask[top : top + rows, left : left + columns], connectivity=8)
        flat = regions.reshape(-1)
        sizes = np.bincount(flat)
        sizes[0] = 0  # the pixels of other classes
        removed = sizes < self.min_region
        if label in self.largest:
            if label not in first_pixels:
                y, x = divmod(int(sizes[flat].argmax()), columns)
                first_pixels[label] = (top + y, left + x)
            y, x = first_pixels[label]
            removed |= np.arange(len(sizes)) != (regions[y - top, x - left] if mask[y, x] else 0)
        removed[0] = False
        found = np.flatnonzero(removed[flat])
        return (found // columns + top) * mask.shape[1] + found % columns + left
