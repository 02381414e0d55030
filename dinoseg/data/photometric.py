"""Random colour changes of training views: the contract, and photometric distortion as in official training codes."""

from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np

from dinoseg.utils.errors import UserError
from dinoseg.utils.ranges import HalfShare, Share

SWITCHES = 5  # random numbers of a view for colour changes that are applied at random or in a random order
_GREY = (np.float32(0.2989), np.float32(0.587), np.float32(0.114))  # torchvision's weights, whose sum is 0.9999
_UNIT = np.float32(255.999)  # torchvision's factor from 0..1 to 8 bits, before truncation
_STEPS = 180  # hues of OpenCV's 8-bit HSV


class ColorTransform:
    """Contract of the augmentation of colours: a colour change that random numbers determine.

    Attributes:
        has_switches: whether it uses the last `SWITCHES` random numbers; they are sampled only then.
        before_scaling: whether it changes the whole image before it is scaled, instead of the view.
    """

    has_switches: bool = False
    before_scaling: bool = False

    def __call__(self, image: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
        """Return an image (H, W, 3), uint8 or uint16, in changed colours.

        Args:
            image: pixels, RGB.
            uniforms: random numbers in 0..1: the amounts of brightness, contrast, saturation and hue, then switches.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class PhotometricDistortion(ColorTransform):
    """Brightness, contrast, saturation and hue in 8 bits, each with a probability.

    The order is brightness, saturation, hue; contrast comes before saturation or after hue, with probability 0.5 each.
    Each change is clipped to 0..255 and truncated to whole numbers. With the keys named in `docs/augmentation.md`, the
    values are those of mmsegmentation (`PhotoMetricDistortion`, mmseg/datasets/transforms/transforms.py; the same in
    0.27), DINOv3 (dinov3/eval/segmentation/transforms.py) and EoMT (datasets/transforms.py; torchvision's functions).

    Args:
        brightness: largest change, as a share of 255 if `additive`, otherwise of the factor on all values.
        contrast: largest deviation of the factor from 1.
        saturation: largest deviation of the factor from 1.
        hue: largest rotation of the colour circle to either side; 0.5 is half the circle.
        probability: of each change.
        additive: True: brightness is added and contrast multiplies all values. False: brightness multiplies all values
            and contrast their distance from the mean grey of the image.
        space: colour space of saturation and hue. rgb: saturation multiplies the distance from each pixel's grey, and
            hue is rotated in floating point (torchvision). hsv: saturation multiplies S, and whole steps of 2 degrees
            are added to H, in OpenCV's 8-bit HSV, each with a conversion there and back (mmsegmentation).
        before_scaling: True: change the whole image before it is scaled. False: change the view, which is faster.
    """

    brightness: Share
    contrast: Share
    saturation: Share
    hue: HalfShare
    probability: Share = 0.5
    additive: bool = False
    space: Literal["rgb", "hsv"] = "rgb"
    before_scaling: bool = False

    has_switches = True

    def __call__(self, image: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
        """Return an image (H, W, 3) uint8 in changed colours; `uniforms` are 4 amounts, 4 switches, and the order's.

        A switch below `probability` applies its change; the last number below 0.5 puts contrast before saturation.

        Raises:
            UserError: the image has 16 bits.
        """
        if image.dtype != np.uint8:
            raise UserError("color=photometric changes images of 8 bits, and these have 16. Choose color=jitter.")
        changes = (
            (self._brighten, self.brightness),
            (self._contrast, self.contrast),
            (self._saturate, self.saturation),
            (self._turn_hue, self.hue),
        )
        # a change has random numbers of its own, so that its amount does not depend on the order
        for number in (0, 1, 2, 3) if uniforms[8] < 0.5 else (0, 2, 3, 1):
            change, largest = changes[number]
            if largest and uniforms[4 + number] < self.probability:
                image = change(image, uniforms[number])
        return image

    def _brighten(self, image: np.ndarray, uniform: float) -> np.ndarray:
        # as a table of 256 values: arithmetic on every pixel takes twice as long
        amount = self.brightness * (2 * uniform - 1)
        return cv2.LUT(image, _table(1, 255 * amount) if self.additive else _table(1 + amount, 0))

    def _contrast(self, image: np.ndarray, uniform: float) -> np.ndarray:
        factor = 1 + self.contrast * (2 * uniform - 1)
        mean = 0.0 if self.additive else float(_grey(image).mean(dtype=np.float64))
        return cv2.LUT(image, _table(factor, (1 - factor) * mean))

    def _saturate(self, image: np.ndarray, uniform: float) -> np.ndarray:
        factor = 1 + self.saturation * (2 * uniform - 1)
        if self.space == "hsv":
            return _change_hsv(image, 1, _table(factor, 0))
        blend = image * np.float32(factor)
        blend += cv2.merge([_grey(image) * np.float32(1 - factor)] * 3)  # three times as fast as broadcasting
        return blend.clip(0, 255, out=blend).astype(np.uint8)

    def _turn_hue(self, image: np.ndarray, uniform: float) -> np.ndarray:
        if self.space == "hsv":
            # `randint` of NumPy, which mmsegmentation calls, never returns its upper limit
            largest = round(self.hue * _STEPS)
            steps = int(2 * largest * uniform) - largest  # -largest to largest - 1
            return _change_hsv(image, 0, ((np.arange(256) + steps) % _STEPS).astype(np.uint8))
        hsv = cv2.cvtColor(image / np.float32(255), cv2.COLOR_RGB2HSV)
        hsv[..., 0] = hsv[..., 0] + float(
            360 * self.hue * (2 * uniform - 1) % 360
        )  # degrees; OpenCV takes 360 and more
        return (cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB) * _UNIT).astype(np.uint8)


def _table(factor: float, offset: float) -> np.ndarray:
    """Return factor * value + offset of each 8-bit value in float32, clipped and truncated to 8 bits."""
    values = np.arange(256, dtype=np.float32) * np.float32(factor) + np.float32(offset)
    return values.clip(0, 255).astype(np.uint8)


def _grey(image: np.ndarray) -> np.ndarray:
    """Return the grey (H, W) float32 of each pixel, truncated to whole numbers."""
    red, green, blue = (image[..., channel] * weight for channel, weight in enumerate(_GREY))
    return np.floor(red + green + blue)


def _change_hsv(image: np.ndarray, channel: int, table: np.ndarray) -> np.ndarray:
    """Return an image whose H (0), S (1) or V (2) in OpenCV's 8-bit HSV is replaced by that of a table (256,)."""
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    hsv[..., channel] = cv2.LUT(hsv[..., channel], table)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
