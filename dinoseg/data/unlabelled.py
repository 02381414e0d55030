"""Images without masks, and the strong views of them that a student learns from."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor

from dinoseg.core.shapes import Sample, SegmentationData
from dinoseg.data.pairs.pair import image_hash
from dinoseg.data.transforms import ColorJitter, recolor
from dinoseg.data.video.access import ImageSource, read_source
from dinoseg.utils.errors import UserError
from dinoseg.utils.ranges import Few, Positive, Share

_DRAWS = 12  # numbers of a strong view
_AREA, _ASPECT = (0.02, 0.4), (0.3, 1 / 0.3)  # of a box, as shares of the view's area, and of its width by its height
_GREY = ColorJitter(saturation=1.0)
_NO_COLOUR = np.array([0.5, 0.5, 0.0, 0.5])  # of `recolor`: all as it is but the saturation, which is 0


@dataclass(frozen=True)
class StrongView:
    """Ranges of what a view goes through before a student sees it (UniMatch V2, arXiv 2410.10777, and CutMix).

    Args:
        color: of a colour change.
        jitter: its probability.
        grey: probability that all colour is taken.
        blur: probability of a Gaussian blur.
        sigma: least and largest deviation of that, pixels.
        cutmix: probability that a box of the next image of the batch is put in.
    """

    color: ColorJitter = ColorJitter(0.5, 0.5, 0.5, 0.25)
    jitter: Share = 0.8
    grey: Share = 0.2
    blur: Share = 0.5
    sigma: Sequence[Positive] = (0.1, 2.0)
    cutmix: Share = 0.5

    def __post_init__(self) -> None:
        """Refuse a blur of no range."""
        if len(self.sigma) != 2 or self.sigma[0] > self.sigma[1]:
            raise UserError(f"sigma={list(self.sigma)}: give [least, largest] with least <= largest.")

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, tuple[int, int, int, int]]:
        """Return a strong view of a weak one (H, W, 3) uint8, and a box: top, left, bottom, right; empty: none.

        The number of draws from `rng` is always the same.
        """
        chance = rng.random(_DRAWS)
        if chance[0] < self.jitter:
            image = recolor(image, self.color, chance[1:5])
        if chance[5] < self.grey:
            image = recolor(image, _GREY, _NO_COLOUR)
        if chance[6] < self.blur:
            least, largest = self.sigma
            image = cv2.GaussianBlur(image, (0, 0), least + (largest - least) * chance[7])
        return image, _box(image.shape[:2], chance[8:]) if rng.random() < self.cutmix else (0, 0, 0, 0)


class Views(NamedTuple):
    """An image without a mask, as a teacher and a student see it."""

    weak: Tensor  # (3, H, W) uint8
    outside: Tensor  # (H, W) uint8, the ignored id beyond the image's border
    strong: Tensor  # (V, 3, H, W) uint8
    boxes: Tensor  # (V, 4) int64


@dataclass(frozen=True)
class UnlabelledImages:
    """Images of any size without masks.

    Args:
        sources: where they are read from.
        augment: see `Augment`: the weak view that a teacher labels.
        strong: what makes strong views of it.
        views: how many of these.
        inside: an id that is not ignored.
    """

    sources: Sequence[ImageSource]
    augment: Callable[[np.ndarray, np.ndarray, np.random.Generator], tuple[np.ndarray, np.ndarray]]
    strong: StrongView
    views: Few
    inside: int = 0

    def __len__(self) -> int:
        return len(self.sources)

    def read(self, index: int, rng: np.random.Generator) -> Views:
        """Return the views of an image that `rng` draws.

        Raises:
            UserError: it cannot be read.
        """
        pixels = np.ascontiguousarray(_read(self.sources[index]))
        weak, outside = self.augment(pixels, np.full(pixels.shape[:2], self.inside, np.uint8), rng)
        strong, boxes = zip(*(self.strong(weak, rng) for _ in range(self.views)), strict=True)
        views = torch.stack(list(map(_planes, strong)))
        return Views(_planes(weak), torch.from_numpy(outside), views, torch.tensor(boxes))


class Unmasked:
    """Images without masks as a data set to train on: all their pixels are ignored.

    Args:
        names: of the images, unique.
        sources: where they are read from.
        labels: classes, palette and ignored id of the data set that they stand beside.
    """

    def __init__(self, names: Sequence[str], sources: Sequence[ImageSource], labels: SegmentationData) -> None:
        self.names, self.sources = names, sources
        self.classes, self.palette, self.ignore_index = labels.classes, labels.palette, labels.ignore_index
        self.skipped: Mapping[str, str] = {}

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: int) -> Sample:
        pixels = np.array(_read(self.sources[index]))
        mask = torch.full(pixels.shape[:2], self.ignore_index, dtype=torch.uint8)
        return Sample(image=_planes(pixels), mask=mask, name=self.names[index])

    def mask(self, index: int) -> np.ndarray:
        """Return the mask (H, W) uint8 of an image, which is read for its size."""
        return self[index]["mask"].numpy()

    def image_hash(self, index: int) -> str:
        """Return a hash of the bytes that an image is read from.

        Raises:
            UserError: they cannot be read.
        """
        return image_hash(self.sources[index])


def fault(source: ImageSource) -> str:
    """Return why an image cannot be read; empty where it can."""
    try:
        read_source(source)
    except UserError as error:
        return str(error)
    return ""


def _read(source: ImageSource) -> np.ndarray:
    try:
        return read_source(source)
    except UserError as error:
        raise UserError(f"{error} Or leave such images without masks out: data.on_error=skip.") from error


def _planes(image: np.ndarray) -> Tensor:
    return torch.from_numpy(image).permute(2, 0, 1)


def _box(size: tuple[int, ...], chance: np.ndarray) -> tuple[int, int, int, int]:
    """Return a box of random area, form and place; one that would not fit is cut to the view's height or width."""
    height, width = size
    area = height * width * (_AREA[0] + (_AREA[1] - _AREA[0]) * chance[0])
    aspect = _ASPECT[0] * (_ASPECT[1] / _ASPECT[0]) ** chance[1]
    tall = min(height, max(1, round((area / aspect) ** 0.5)))
    wide = min(width, max(1, round((area * aspect) ** 0.5)))
    top, left = int((height - tall + 1) * chance[2]), int((width - wide + 1) * chance[3])
    return top, left, top + tall, left + wide
