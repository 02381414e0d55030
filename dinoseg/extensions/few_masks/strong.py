"""Strong views of a crop: colours, grey, blur and CutMix boxes of UniMatch V2 (arXiv 2410.10777)."""

import math

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

from dinoseg.utils.errors import UserError

# the official settings of all datasets (LiheYoung/UniMatch-V2, dataset/semi.py and dataset/transform.py)
_JITTER, _GREY, _BLUR, _BOX = 0.8, 0.2, 0.5, 0.5  # probabilities
_FACTORS = (0.5, 1.5)  # of brightness, contrast and saturation
_HUE = 0.25  # largest rotation of the colour circle to either side
_RADIUS = (0.1, 2.0)  # of the Gaussian blur, pixels
_AREA = (0.02, 0.4)  # of a box, as a share of the crop
_RATIO = (0.3, 1 / 0.3)  # of a box's height to its width, each as a share of the crop's side
_ENHANCERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


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


def draw_box(size: tuple[int, int], rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Return top, left, bottom and right of a CutMix box in a crop of `size` (H, W); half of the boxes are empty."""
    if rng.random() > _BOX:
        return 0, 0, 0, 0
    area = rng.uniform(*_AREA)
    while True:
        ratio = rng.uniform(*_RATIO)
        height = int(size[0] * math.sqrt(area * ratio))
        width = int(size[1] * math.sqrt(area / ratio))
        top = int(rng.integers(size[0]))
        left = int(rng.integers(size[1]))
        if top + height <= size[0] and left + width <= size[1]:
            return top, left, top + height, left + width


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
