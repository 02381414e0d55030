"""Unlabelled images, and the strong views of them for the student of a semi-supervised training."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor

from dinoseg.core.shapes import Sample, SegmentationData
from dinoseg.data.pairs.pair import image_hash
from dinoseg.data.transforms import ColorJitter
from dinoseg.data.video.access import ImageSource, read_source
from dinoseg.utils.errors import UserError
from dinoseg.utils.ranges import Few, Positive, Share

_DRAWS = 12  # random numbers per strong view
_AREA, _ASPECT = (0.02, 0.4), (0.3, 1 / 0.3)  # of a CutMix box: area as a share of the view's, and width / height
_GREY = ColorJitter(saturation=1.0)
_NO_COLOUR = np.array([0.5, 0.5, 0.0, 0.5])  # random numbers that only set the saturation to 0


@dataclass(frozen=True)
class StrongView:
    """Strong augmentation of a weak view for the student (UniMatch V2, arXiv 2410.10777, and CutMix).

    Args:
        color: ranges of the colour jitter.
        jitter: probability of the colour jitter.
        grey: probability of conversion to greyscale.
        blur: probability of a Gaussian blur.
        sigma: minimum and maximum standard deviation of the blur, pixels.
        cutmix: probability that a box of the batch's next image is pasted in.
    """

    color: ColorJitter = ColorJitter(0.5, 0.5, 0.5, 0.25)
    jitter: Share = 0.8
    grey: Share = 0.2
    blur: Share = 0.5
    sigma: Sequence[Positive] = (0.1, 2.0)
    cutmix: Share = 0.5

    def __post_init__(self) -> None:
        """Reject a `sigma` that is not an ordered pair, and colours that need more random numbers than a view has."""
        if self.color.has_switches:
            raise UserError("color=PhotometricDistortion(...): a strong view takes ColorJitter only. Give its ranges.")
        if len(self.sigma) != 2 or self.sigma[0] > self.sigma[1]:
            raise UserError(f"sigma={list(self.sigma)}: give [least, largest] with least <= largest.")

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, tuple[int, int, int, int]]:
        """Return a strong view of a weak one (H, W, 3) uint8, and a box (top, left, bottom, right); empty: no CutMix.

        Each call uses a fixed number of random numbers from `rng`.
        """
        uniforms = rng.random(_DRAWS)
        if uniforms[0] < self.jitter:
            image = self.color(image, uniforms[1:5])
        if uniforms[5] < self.grey:
            image = _GREY(image, _NO_COLOUR)
        if uniforms[6] < self.blur:
            least, largest = self.sigma
            image = cv2.GaussianBlur(image, (0, 0), least + (largest - least) * uniforms[7])
        return image, _box(image.shape[:2], uniforms[8:]) if rng.random() < self.cutmix else (0, 0, 0, 0)


class UnlabelledViews(NamedTuple):
    """Views of an unlabelled image for the teacher and the student."""

    weak: Tensor  # (3, H, W) uint8
    outside: Tensor  # (H, W) uint8, the ignored id outside the image's border
    strong: Tensor  # (V, 3, H, W) uint8
    boxes: Tensor  # (V, 4) int64


@dataclass(frozen=True)
class UnlabelledImages:
    """Images of any size without masks.

    Args:
        sources: where to read the images from.
        augment: see `Augment`; makes the weak view that the teacher labels.
        strong: makes strong views of the weak view.
        views: number of strong views.
        inside: any id that is not ignored, to mark pixels inside the image.
    """

    sources: Sequence[ImageSource]
    augment: Callable[[np.ndarray, np.ndarray, np.random.Generator], tuple[np.ndarray, np.ndarray]]
    strong: StrongView
    views: Few
    inside: int = 0

    def __len__(self) -> int:
        return len(self.sources)

    def read(self, index: int, rng: np.random.Generator) -> UnlabelledViews:
        """Return views of an image, sampled with `rng`.

        Raises:
            UserError: the image cannot be read.
        """
        pixels = np.ascontiguousarray(_read(self.sources[index]))
        weak, outside = self.augment(pixels, np.full(pixels.shape[:2], self.inside, np.uint8), rng)
        strong, boxes = zip(*(self.strong(weak, rng) for _ in range(self.views)), strict=True)
        views = torch.stack(list(map(_planes, strong)))
        return UnlabelledViews(_planes(weak), torch.from_numpy(outside), views, torch.tensor(boxes))


class Unmasked:
    """Training dataset of images without masks: all their pixels are ignored.

    Args:
        names: names of the images, unique.
        sources: where to read the images from.
        labels: the labelled dataset, which gives classes, palette and ignored id.
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
        """Return the mask (H, W) uint8 of an image; reads the image for its size."""
        return self[index]["mask"].numpy()

    def image_hash(self, index: int) -> str:
        """Return a hash of the bytes that an image is read from.

        Raises:
            UserError: they cannot be read.
        """
        return image_hash(self.sources[index])


def fault(source: ImageSource) -> str:
    """Return the reason why an image cannot be read, or an empty string if it can."""
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


def _box(size: tuple[int, ...], uniforms: np.ndarray) -> tuple[int, int, int, int]:
    """Return a box of random area, aspect ratio and position; its sides are limited to the view's height and width."""
    height, width = size
    area = height * width * (_AREA[0] + (_AREA[1] - _AREA[0]) * uniforms[0])
    aspect = _ASPECT[0] * (_ASPECT[1] / _ASPECT[0]) ** uniforms[1]
    tall = min(height, max(1, round((area / aspect) ** 0.5)))
    wide = min(width, max(1, round((area * aspect) ** 0.5)))
    top, left = int((height - tall + 1) * uniforms[2]), int((width - wide + 1) * uniforms[3])
    return top, left, top + tall, left + wide
