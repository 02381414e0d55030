"""DatasetFacts about a dataset that decide how to train on it: image size, rare classes and thin classes."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from dinoseg.core.shapes import SegmentationData
from dinoseg.core.sizes import Size, evenly_spaced
from dinoseg.data.pairs.dataset import PairDataset
from dinoseg.data.scan.scan import class_counts
from dinoseg.utils.wording import count_of, join_names

_CHECKED = 48  # evenly spaced masks that are read to measure parts
_MIN, _PIXELS = 8, 2**24  # masks at least, and pixels in all: a megapixel takes about 0.1 s per class
_BORDER = 1  # px; distances run between pixel centres, so doubling them counts one pixel too many


@dataclass(frozen=True)
class ClassFacts:
    """DatasetFacts about a class.

    Attributes:
        name: of the class.
        share: of the labelled training pixels.
        width: px; half of the class's pixels lie in connected parts of at most this width. NaN: not in the sampled
            masks.
    """

    name: str
    share: float
    width: float


@dataclass(frozen=True)
class DatasetFacts:
    """DatasetFacts about a dataset.

    Attributes:
        images: number of training images.
        val_images: number of validation images.
        size: medians of (H, W) of evenly spaced training images.
        classes: in the order of their ids.
        has_layers: whether each class has masks of its own, so that classes may overlap.
    """

    images: int
    val_images: int
    size: Size
    classes: tuple[ClassFacts, ...]
    has_layers: bool = False

    @property
    def absent(self) -> list[str]:
        """Names of the classes without a pixel in the training masks."""
        return [each.name for each in self.classes if each.share == 0]

    def thinner(self, width: float) -> list[ClassFacts]:
        """Return the classes whose parts are thinner than `width` px, the thinnest first."""
        return sorted((each for each in self.classes if each.width < width), key=lambda each: each.width)

    def rarer(self, share: float) -> list[ClassFacts]:
        """Return the classes that cover less than `share` of the pixels, but more than none, the rarest first."""
        return sorted((each for each in self.classes if 0 < each.share < share), key=lambda each: each.share)


def facts_of(train: SegmentationData, val: SegmentationData, cache_dir: str | Path) -> DatasetFacts:
    """Return the facts about a dataset; each training mask is read once, and its counts are cached in `cache_dir`.

    Raises:
        UserError: a mask cannot be read.
    """
    counts = class_counts(train, cache_dir)
    files = train.source if isinstance(train, PairDataset) else train  # packed masks may be reduced
    places = evenly_spaced(len(train), _CHECKED)
    masks = [files[index]["mask"].numpy() for index in places]
    names = [str(name) for name in train.classes]
    measured = masks[:: min(max(1, len(masks) // _MIN), math.ceil(sum(mask.size for mask in masks) / _PIXELS))]
    parts = np.concatenate([list(parts_of(mask, len(names))) or np.empty((0, 3)) for mask in measured])
    sizes = [mask.shape[-2:] for mask in masks]
    has_layers = masks[0].ndim > 2
    # classes that overlap do not add up to the pixels of the images, of which the sampled masks are a share
    total = len(train) * np.prod(sizes, axis=1).mean() if has_layers else max(1, int(counts.sum()))
    classes = (
        ClassFacts(name, float(counts[id] / total), median_width(parts[parts[:, 0] == id]))
        for id, name in enumerate(names)
    )
    height, width = np.median(sizes, axis=0)
    return DatasetFacts(len(train), len(val), (round(height), round(width)), tuple(classes), has_layers)


def headline(facts: DatasetFacts, minutes: float, device: str) -> str:
    """Return a one-line summary of data, time budget and device."""
    height, width = facts.size
    overlap = " that may overlap" if facts.has_layers else ""
    absent = f"; without a pixel in train: {join_names(facts.absent)}" if facts.absent else ""
    return (
        f"{count_of(facts.images, 'training image')} of {height} x {width} (median), "
        f"{count_of(facts.classes, 'class', 'classes')}{overlap}{absent}; {minutes:g} min on this {device}"
    )


def parts_of(mask: np.ndarray, num_classes: int) -> Iterator[tuple[int, float, int]]:
    """Yield class id, width in px and number of pixels of each connected part of a mask (H, W), or (K, H, W) of layers.

    The width is the diameter of the largest disc inside the part, by distances to the nearest pixel outside. It is
    exact to a pixel for lines. A part at the image border is assumed to continue beyond it.
    """
    for id in range(num_classes):
        inside = (mask[id] == 1 if mask.ndim > 2 else mask == id).astype(np.uint8)
        if not inside.any():
            continue
        count, labels, stats, _ = cv2.connectedComponentsWithStats(inside, connectivity=8)
        distance = np.minimum(cv2.distanceTransform(inside, cv2.DIST_L2, cv2.DIST_MASK_PRECISE), max(inside.shape))
        deepest = np.zeros(count, distance.dtype)  # another dtype takes ten times as long
        np.maximum.at(deepest, labels.ravel(), distance.ravel())
        widths = np.minimum(2 * deepest - _BORDER, min(inside.shape))
        yield from ((id, float(widths[part]), int(stats[part, cv2.CC_STAT_AREA])) for part in range(1, count))


def median_width(parts: np.ndarray) -> float:
    """Return the width that half of the pixels of parts (N, 3) from `parts_of` do not exceed; NaN without parts."""
    if not len(parts):
        return float("nan")
    ordered = parts[parts[:, 1].argsort()]
    pixels = ordered[:, 2].cumsum()
    return float(ordered[np.searchsorted(pixels, pixels[-1] / 2), 1])
