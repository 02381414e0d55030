"""Random joint augmentation of image and mask: one warp, one colour matrix, one random generator."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from dinoseg.utils.errors import UserError
from dinoseg.utils.ranges import Count, NotNegative, Share

_OUTSIDE = (128, 128, 128)  # grey outside the image; the mask is ignore_index there
_DRAWS = 12  # random numbers per view
_AREA_BELOW = 0.8  # bilinear reads 2 x 2 pixels: shrinking further would skip some, so average them first
_LUMA = np.array([0.299, 0.587, 0.114])
_YIQ = np.array([_LUMA, [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])


def _check_range(key: str, value: float, most: float) -> None:
    if not 0 <= value <= most:
        raise UserError(f"data.augment: {key}={value} is outside its range: give a number from 0 to {most}.")


@dataclass(frozen=True)
class Affine:
    """Ranges of a random affine transform.

    Args:
        degrees: largest rotation to either side.
        translate: largest shift, as a share of the visible width and height.
        shear: largest shear to either side, degrees.
    """

    degrees: NotNegative = 0.0
    translate: Share = 0.0
    shear: NotNegative = 0.0

    def __post_init__(self) -> None:
        """Reject ranges that could move the whole image out of view."""
        _check_range("degrees", self.degrees, 180)
        _check_range("translate", self.translate, 0.9)
        _check_range("shear", self.shear, 60)


@dataclass(frozen=True)
class ColorJitter:
    """Ranges of a random colour change; a factor is sampled from 1 - x to 1 + x.

    Args:
        brightness: x of the factor on all values.
        contrast: x of the factor on the distance from the mean grey.
        saturation: x of the factor on the distance from each pixel's own grey.
        hue: largest rotation of the colour circle to either side; 0.5 is half the circle.
    """

    brightness: Share = 0.0
    contrast: Share = 0.0
    saturation: Share = 0.0
    hue: Share = 0.0

    def __post_init__(self) -> None:
        """Reject ranges that allow factors below 0."""
        for key, most in (("brightness", 1), ("contrast", 1), ("saturation", 1), ("hue", 0.5)):
            _check_range(key, getattr(self, key), most)


class Augment:
    """Random view of size `crop` from an image and mask of any size.

    The steps are, in order: limit the longer side to `longest`, as the model does; scale; affine transform about the
    centre; crop (padded where the image is smaller); flip; colour. All geometry is one warp: the image bilinear, the
    mask nearest. Pixels outside the image are ignored.

    Args:
        crop: (H, W) of the result, pixels.
        scale: minimum and maximum factor, sampled log-uniformly.
        longest: larger images are reduced until their longer side has this many pixels.
        affine: ranges of rotation, shift and shear.
        flip: probability of a horizontal flip.
        color: ranges of brightness, contrast, saturation and hue.
        ignore_index: id of mask pixels outside the image.
    """

    def __init__(
        self,
        crop: Sequence[int],
        *,
        scale: Sequence[float] = (1.0, 1.0),
        longest: Count | None = None,
        affine: Affine = Affine(),  # noqa: B008 (frozen)
        flip: Share = 0.0,
        color: ColorJitter = ColorJitter(),  # noqa: B008 (frozen)
        ignore_index: int = 255,
    ) -> None:
        if len(crop) != 2 or min(crop) < 1:
            raise UserError(f"crop={list(crop)}: give [height, width] in pixels, each at least 1.")
        if len(scale) != 2 or not 0 < scale[0] <= scale[1]:
            raise UserError(f"data.augment.scale={list(scale)}: give [least, largest] with 0 < least <= largest.")
        if longest is not None and longest < 1:
            raise UserError(f"longest={longest}: give a number of pixels, or null for no limit.")
        if longest is not None and max(crop) > longest:
            raise UserError(
                f"resolution.crop={list(crop)} is larger than resolution.longest={longest}, to which images are "
                f"reduced: choose a crop of at most {longest} pixels a side."
            )
        _check_range("flip", flip, 1)
        self.crop = (int(crop[0]), int(crop[1]))
        self.scale = (float(scale[0]), float(scale[1]))
        self.longest = longest
        self.affine = affine
        self.flip = flip
        self.color = color
        self.ignore_index = ignore_index

    def __call__(
        self, image: np.ndarray, mask: np.ndarray, rng: np.random.Generator, shown: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return a view of image (H, W, 3) and mask (H, W), both uint8.

        Each view uses a fixed number of random numbers, so changing one setting does not change the others' values.

        Args:
            image: pixels.
            mask: class ids.
            rng: random generator.
            shown: class to show: the view contains one of its pixels, sampled uniformly from those of the mask, if any.
        """
        zoom, matrix, uniforms = self._geometry(mask, rng, shown)
        seen = _warp_image(image, matrix, zoom, self.crop)
        return recolor(seen, self.color, uniforms[8:]), self._warp_mask(mask, matrix)

    def mask(self, mask: np.ndarray, rng: np.random.Generator, shown: int | None = None) -> np.ndarray:
        """Return the view of a mask (H, W) alone, equal to the mask of a call with the same `rng` state."""
        return self._warp_mask(mask, self.place(mask, rng, shown))

    def place(self, mask: np.ndarray, rng: np.random.Generator, shown: int | None = None) -> np.ndarray:
        """Return the matrix (3, 3) from image pixels (x, y, 1) to their positions in the view of the same call.

        The mask's values are read only if a class is to be `shown`; otherwise only its size matters.
        """
        return self._geometry(mask, rng, shown)[1]

    def _geometry(
        self, mask: np.ndarray, rng: np.random.Generator, shown: int | None
    ) -> tuple[tuple[float, float], np.ndarray, np.ndarray]:
        """Return the zoom, the matrix and the random numbers of a view."""
        uniforms, (height, width) = rng.random(_DRAWS), mask.shape
        zoom = self._zoom((height, width), uniforms[0])
        pixel = None if shown is None else _any_pixel(mask, shown, rng)
        return zoom, self._matrix((height, width), zoom, uniforms[1:8], pixel), uniforms

    def _warp_mask(self, mask: np.ndarray, matrix: np.ndarray) -> np.ndarray:
        return cv2.warpAffine(
            mask,
            matrix[:2],
            self.crop[::-1],
            flags=cv2.INTER_NEAREST,
            borderMode=cv2.BORDER_CONSTANT,
            borderValue=(self.ignore_index,),
        )

    def _zoom(self, size: tuple[int, int], uniform: float) -> tuple[float, float]:
        """Return output pixels per image pixel, vertically and horizontally."""
        least, largest = self.scale
        factor = least * (largest / least) ** uniform
        limit = min(1.0, self.longest / max(size)) if self.longest else 1.0
        vertical, horizontal = (factor * max(1, round(side * limit)) / side for side in size)
        return vertical, horizontal

    def _matrix(
        self, size: tuple[int, int], zoom: tuple[float, float], uniforms: np.ndarray, pixel: np.ndarray | None
    ) -> np.ndarray:
        """Return the matrix (3, 3) from image pixel centres (x, y, 1) to the crop, which contains `pixel` if given."""
        height, width = size[0] * zoom[0], size[1] * zoom[1]
        crop_height, crop_width = self.crop
        signed = 2 * uniforms - 1
        turn = _turn_and_slant(self.affine.degrees * signed[0], self.affine.shear * signed[1])
        shift_x = self.affine.translate * signed[2] * min(width, crop_width)
        shift_y = self.affine.translate * signed[3] * min(height, crop_height)
        centre_x, centre_y = (width - 1) / 2, (height - 1) / 2
        turn = _move(centre_x, centre_y) @ turn @ _move(-centre_x, -centre_y)
        if pixel is None:
            left, top = _crop_start(width - crop_width, uniforms[4]), _crop_start(height - crop_height, uniforms[5])
        else:
            x, y, _ = _move(shift_x, shift_y) @ turn @ _resize(zoom) @ pixel
            left = _crop_start_at(x, width, crop_width, uniforms[4])
            top = _crop_start_at(y, height, crop_height, uniforms[5])
        matrix = _move(shift_x - left, shift_y - top) @ turn @ _resize(zoom)
        if uniforms[6] < self.flip:
            matrix = np.array([[-1.0, 0, crop_width - 1], [0, 1, 0], [0, 0, 1]]) @ matrix
        return matrix


def _crop_start(room: float, uniform: float) -> float:
    """Return the start of a crop in whole pixels; `room` is negative where the image is smaller than the crop."""
    return round(min(0.0, room) + abs(room) * uniform)


def _crop_start_at(at: float, length: float, crop: int, uniform: float) -> float:
    """Return the start of a crop such that `at` falls on a pixel centre inside it, so that nearest mapping reads it.

    If possible, the crop starts where `_crop_start` would start it, to within half a pixel. If rotation or shift moved
    `at` outside the image's bounds, the crop follows it there.
    """
    room = length - crop
    first, last = (min(max(round(at - start), 0), crop - 1) for start in (max(0.0, room), min(0.0, room)))
    return at - (first + int(uniform * (last + 1 - first)))


def _any_pixel(mask: np.ndarray, shown: int, rng: np.random.Generator) -> np.ndarray | None:
    """Return the centre (x, y, 1) of a random pixel of a class, or None if the mask has none."""
    places = np.flatnonzero(mask == shown)
    if not len(places):
        return None
    y, x = divmod(int(places[rng.integers(len(places))]), mask.shape[1])
    return np.array([x, y, 1.0])


def _warp_image(image: np.ndarray, matrix: np.ndarray, zoom: tuple[float, float], crop: tuple[int, int]) -> np.ndarray:
    if min(zoom) < _AREA_BELOW:
        height, width = image.shape[:2]
        small = (max(1, round(height * zoom[0])), max(1, round(width * zoom[1])))
        image = cv2.resize(image, small[::-1], interpolation=cv2.INTER_AREA)
        matrix = matrix @ np.linalg.inv(_resize((small[0] / height, small[1] / width)))
    return cv2.warpAffine(
        image,
        matrix[:2],
        crop[::-1],
        flags=cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_CONSTANT,
        borderValue=_OUTSIDE,
    )


def recolor(image: np.ndarray, color: ColorJitter, uniforms: np.ndarray) -> np.ndarray:
    """Return an image (H, W, 3) uint8 in changed colours; `uniforms` (4,) in 0..1 sets the amounts within `color`.

    The order of `uniforms` is brightness, contrast, saturation, hue. All changes form one matrix, so values are clipped
    only once.
    """
    if color == ColorJitter():
        return image
    signed = 2 * uniforms - 1
    brightness = 1 + color.brightness * signed[0]
    contrast = 1 + color.contrast * signed[1]
    saturation = 1 + color.saturation * signed[2]
    angle = 2 * math.pi * color.hue * signed[3]
    chroma = np.array(
        [
            [1, 0, 0],
            [0, saturation * math.cos(angle), -saturation * math.sin(angle)],
            [0, saturation * math.sin(angle), saturation * math.cos(angle)],
        ]
    )
    linear = brightness * contrast * (np.linalg.inv(_YIQ) @ chroma @ _YIQ)
    mean_grey = float(np.dot(cv2.mean(image)[:3], _LUMA))
    offset = np.full((3, 1), (1 - contrast) * brightness * mean_grey)
    return cv2.transform(image, np.hstack([linear, offset]))


def _turn_and_slant(degrees: float, shear: float) -> np.ndarray:
    angle, slant = math.radians(degrees), math.tan(math.radians(shear))
    cosine, sine = math.cos(angle), math.sin(angle)
    turn = np.array([[cosine, -sine, 0], [sine, cosine, 0], [0, 0, 1]])
    return turn @ np.array([[1, slant, 0], [0, 1, 0], [0, 0, 1]])


def _resize(zoom: tuple[float, float]) -> np.ndarray:
    """Return the matrix that maps pixel centres when an image is resized."""
    vertical, horizontal = zoom
    return np.array([[horizontal, 0, (horizontal - 1) / 2], [0, vertical, (vertical - 1) / 2], [0, 0, 1]])


def _move(x: float, y: float) -> np.ndarray:
    return np.array([[1, 0, x], [0, 1, y], [0, 0, 1]])
