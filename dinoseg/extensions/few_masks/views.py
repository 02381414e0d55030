"""Views of images without masks: a weak one for the teacher, and strong ones of the same crop for the student."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter
from torch import Tensor

from dinoseg.core.shapes import StackedSamples, collect_tensors, tree_map
from dinoseg.data.loader import TrainViews, make_rng
from dinoseg.utils.errors import UserError
from dinoseg.utils.ranges import Range

_STRONG = 6  # purpose of random streams, see `dinoseg.data.loader`
# the official settings of all datasets (LiheYoung/UniMatch-V2, dataset/semi.py and dataset/transform.py)
_JITTER, _GREY, _BLUR, _BOX = 0.8, 0.2, 0.5, 0.5  # probabilities
_FACTORS = (0.5, 1.5)  # of brightness, contrast and saturation
_HUE = 0.25  # largest rotation of the colour circle to either side
_RADIUS = (0.1, 2.0)  # of the Gaussian blur, pixels
_AREA = (0.02, 0.4)  # of a box, as a share of the crop
_RATIO = (0.3, 1 / 0.3)  # of a box's height to its width, each as a share of the crop's side
_ENHANCERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


@dataclass
class UnlabelledBatch(StackedSamples):
    """Views of images without masks, of one size."""

    weak: Tensor  # (B, C, H, W) uint8
    strong: Tensor  # (B, V, C, H, W) uint8, V views of each image, before CutMix
    boxes: Tensor  # (B, V, H, W) bool, True = inside a CutMix box
    padding: Tensor  # (B, H, W) bool, True = outside the image
    truth: Tensor  # (B, H, W) uint8, the masks that a study knows; all ignored for other images
    names: list[str]

    def mix(self, values: Tensor, view: int) -> Tensor:
        """Return values (B, ..., H, W) with those of image B - 1 - i inside the box of image i in a view (CutMix)."""
        inside = self.boxes[:, view].unsqueeze(1) if values.ndim > 3 else self.boxes[:, view]
        return torch.where(inside, values.flip(0), values)

    def count_pixels(self) -> Tensor:
        """Return the number of pixels (V,) float32 of each view that are not padding, after CutMix."""
        return torch.stack([(~self.mix(self.padding, view)).sum() for view in range(self.boxes.shape[1])]).float()


@dataclass(frozen=True, kw_only=True)
class UnlabelledViews(TrainViews):
    """Views of the images without masks of a training.

    Args:
        strong_views: number of strong views of an image.
        truths: functions that read the masks of some images, for a study; no training uses them.
    """

    strong_views: Annotated[int, Range("1 or 2", 1, 2)]
    truths: Mapping[int, Callable[[], np.ndarray]]

    def read_views(self, epoch: int, sample: int) -> UnlabelledBatch:
        """Return the views of an image in an epoch, as a batch of one."""
        whole = self.data[sample]
        pixels = np.ascontiguousarray(whole["image"].permute(1, 2, 0).numpy())  # (H, W, C)
        blank = np.zeros(pixels.shape[:2], np.uint8)
        weak, outside = self.augment(pixels, blank, self.make_rng(epoch, sample))
        mask = whole["mask"].numpy()  # all ignored
        if sample in self.truths:
            # masks outside of the training may be unfinished, or of another size
            with suppress(UserError):
                known = self.truths[sample]()
                mask = known if known.shape == mask.shape else mask
        truth = self.augment.mask(mask, self.make_rng(epoch, sample))  # type: ignore[attr-defined]
        streams = [make_rng(self.seed, epoch, sample, _STRONG, view) for view in range(self.strong_views)]
        strong = np.stack([draw_strong_view(weak, rng) for rng in streams])
        boxes = np.stack([draw_box((weak.shape[0], weak.shape[1]), rng) for rng in streams])
        return UnlabelledBatch(
            weak=torch.from_numpy(weak).permute(2, 0, 1)[None],
            strong=torch.from_numpy(strong).permute(0, 3, 1, 2)[None],
            boxes=torch.from_numpy(boxes)[None],
            padding=torch.from_numpy(outside != 0)[None],
            truth=torch.from_numpy(truth)[None],
            names=[whole["name"]],
        )


def join_views(samples: Sequence[UnlabelledBatch]) -> UnlabelledBatch:
    """Concatenate views of one size."""
    columns = zip(*map(collect_tensors, samples), strict=True)
    joined = tree_map(samples[0], lambda _: torch.cat(next(columns)))
    return replace(joined, names=[name for sample in samples for name in sample.names])


def draw_strong_view(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return a crop (H, W, C) uint8 with other colours of its first three channels, and blurred.

    The changes are those of torchvision's `ColorJitter` and `RandomGrayscale` on Pillow's images, in 8 bits.

    Raises:
        UserError: the image has fewer channels or more bits.
    """
    if image.dtype != np.uint8 or image.shape[2] < 3:
        raise UserError(
            f"Strong views change the colours of RGB images of 8 bits; these are {image.dtype} with {image.shape[2]} "
            "channels. Choose trainer=distil or trainer=supervised."
        )
    planes = [_change_colors(Image.fromarray(image[..., :3]), rng)]
    planes += [Image.fromarray(plane) for plane in np.moveaxis(image[..., 3:], 2, 0)]
    if rng.random() < _BLUR:
        blur = ImageFilter.GaussianBlur(rng.uniform(*_RADIUS))
        planes = [plane.filter(blur) for plane in planes]
    return np.dstack([np.asarray(plane) for plane in planes])


def draw_box(size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Return the CutMix box in a crop of `size` (H, W) as bool, True = inside; half of the boxes are empty."""
    box = np.zeros(size, bool)
    if rng.random() > _BOX:
        return box
    area = rng.uniform(*_AREA)
    while not box.any():
        ratio = rng.uniform(*_RATIO)
        height = int(size[0] * math.sqrt(area * ratio))
        width = int(size[1] * math.sqrt(area / ratio))
        top, left = rng.integers(size)
        if top + height <= size[0] and left + width <= size[1]:
            box[top : top + height, left : left + width] = True
    return box


def _change_colors(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    if rng.random() < _JITTER:
        factors = rng.uniform(*_FACTORS, size=3)
        turn = rng.uniform(-_HUE, _HUE)
        for number in rng.permutation(4):
            image = _turn_hue(image, turn) if number == 3 else _ENHANCERS[number](image).enhance(factors[number])
    return image.convert("L").convert("RGB") if rng.random() < _GREY else image


def _turn_hue(image: Image.Image, turn: float) -> Image.Image:
    """Return an image whose hues are rotated by a share of the circle, in whole steps of 1/256 of it."""
    hsv = np.array(image.convert("HSV"))
    hsv[..., 0] += np.int32(turn * 255).astype(np.uint8)  # wraps around
    return Image.fromarray(hsv, "HSV").convert("RGB")
