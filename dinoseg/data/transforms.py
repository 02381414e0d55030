"""Random joint augmentation of image, mask and maps: one warp, one colour matrix, one random generator."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Annotated, Literal, NamedTuple

import cv2
import numpy as np
from PIL import Image

from dinoseg.core.sample_maps import MapKind
from dinoseg.data.photometric import SWITCHES, ColorTransform
from dinoseg.utils.errors import UserError
from dinoseg.utils.levels import EXACT
from dinoseg.utils.ranges import Byte, Count, HalfShare, HighShare, Positive, Range, Share

_DRAWS = 12  # random numbers per view
_CHECKS = 10  # crops that are compared with `cat_max_ratio`; the next one is taken unchecked
_AREA_BELOW = 0.8  # bilinear reads 2 x 2 pixels: shrinking further would skip some, so average them first
_LUMA = np.array([0.299, 0.587, 0.114])
_YIQ = np.array([_LUMA, [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])


@dataclass(frozen=True)
class Affine:
    """Ranges of a random affine transform.

    Args:
        degrees: largest rotation to either side.
        translate: largest shift, as a share of the visible width and height.
        shear: largest shear to either side, degrees.
    """

    degrees: Annotated[float, Range("a number from 0 to 180", 0, 180)] = 0.0
    translate: Annotated[float, Range("a number from 0 to 0.9", 0, 0.9)] = 0.0
    shear: Annotated[float, Range("a number from 0 to 60", 0, 60)] = 0.0


@dataclass(frozen=True)
class ColorJitter(ColorTransform):
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
    hue: HalfShare = 0.0

    def __call__(self, image: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
        """Return an image (H, W, 3) in changed colours; all changes form one matrix, so values are clipped once.

        The first 4 `uniforms` are those of brightness, contrast, saturation and hue; 0.5 is no change.
        """
        if self == ColorJitter():
            return image
        signed = 2 * uniforms[:4] - 1
        # x -> brightness * (contrast * M x + (1 - contrast) * mean), where M scales and turns the chroma (I, Q) of YIQ
        brightness = 1 + self.brightness * signed[0]
        contrast = 1 + self.contrast * signed[1]
        saturation = 1 + self.saturation * signed[2]
        angle = 2 * math.pi * self.hue * signed[3]
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


class _View(NamedTuple):
    """Geometry of a view, and its random numbers for colours."""

    matrix: np.ndarray  # (3, 3), from image pixel centres (x, y, 1) to those of the view
    zoom: tuple[float, float]  # view pixels per image pixel, vertically and horizontally
    colors: np.ndarray  # (4,) or (4 + SWITCHES,)


@dataclass(eq=False)
class Augment:
    """Random view of size `crop` from an image and mask of any size.

    The steps are, in order: limit the longer side to `longest`, as the model does; scale; affine transform about the
    centre; crop (padded where the image is smaller); flip; colour. All geometry is one warp: the image bilinear (after
    `resample`, if it is reduced), the mask nearest, maps by their kinds. Pixels outside the image are ignored.

    Args:
        crop: (H, W) of the result, pixels.
        scale: minimum and maximum factor.
        relative_to: the size at factor 1. image: the image's own after `longest`. short, long: the shorter or longer
            side is the crop's, as in mmsegmentation and DINOv3. fit: the largest that fits into the crop, as in
            torchvision's ScaleJitter and EoMT. All but image give whole pixels, whatever `longest` is.
        distribution: of the factor: log_uniform or uniform.
        resample: how images are reduced. area: averages of the covered pixels, below a factor of 0.8. antialias: a
            triangle filter as wide as two pixels of the view, as in Pillow, torchvision and `mode=eval`. bilinear: from
            the nearest 2 x 2 pixels, as in OpenCV and mmsegmentation. Enlarged images are bilinear with all three.
        longest: larger images are reduced until their longer side has this many pixels.
        cat_max_ratio: a crop is accepted if, without ignored pixels, it shows several classes and the largest one's
            share is below this. Up to 10 crops are checked, the next one is taken (mmsegmentation's RandomCrop).
        affine: ranges of rotation, shift and shear.
        flip: probability of a horizontal flip.
        padding: place of an image smaller than the crop. spread: random; colours change the padded pixels too. end: top
            left, flipped before it is cropped, and padded pixels keep the colour `fill`, unless `affine` moves it.
        fill: RGB of padded pixels, 0..255; channels that are no colours get its mean.
        color: change of colours: of the first three channels, or of a single one as grey; two are no colours.
        ignore_index: id of mask pixels outside the image.
    """

    crop: tuple[Count, Count]
    _: KW_ONLY
    scale: tuple[Positive, Positive] = (1.0, 1.0)
    relative_to: Literal["image", "short", "long", "fit"] = "image"
    distribution: Literal["log_uniform", "uniform"] = "log_uniform"
    resample: Literal["area", "antialias", "bilinear"] = "area"
    longest: Count | None = None
    cat_max_ratio: HighShare | None = None
    affine: Affine = Affine()
    flip: Share = 0.0
    padding: Literal["spread", "end"] = "spread"
    fill: tuple[Byte, Byte, Byte] = (128, 128, 128)
    color: ColorTransform = ColorJitter()
    ignore_index: int = 255

    def __post_init__(self) -> None:
        """Refuse values that contradict each other."""
        self.crop = (self.crop[0], self.crop[1])  # a config gives a list
        if self.scale[0] > self.scale[1]:
            raise UserError(f"scale={list(self.scale)}: give [least, largest] with least <= largest.")
        if self.relative_to == "image" and self.longest is not None and max(self.crop) > self.longest:
            raise UserError(
                f"crop={list(self.crop)} is larger than longest={self.longest}, to which images are reduced: choose a "
                f"crop of at most {self.longest} pixels a side."
            )

    def __call__(self, image: np.ndarray, mask: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Return a view of image (H, W, C), uint8 or uint16, and mask (H, W) or (K, H, W) uint8.

        Each part of a view uses its own random numbers, so changing one setting does not change the others' values.

        Args:
            image: pixels.
            mask: class ids.
            rng: random generator.
        """
        view = self._geometry(mask, rng)
        if self.color.before_scaling:
            image = self._change_colors(image, view.colors)
        seen = self._warp_image(image, view)
        if not self.color.before_scaling:
            seen = self._change_colors(seen, view.colors)
        if seen.shape[:2] != self.crop:
            # after the colours, so that padded pixels keep `fill`
            bottom, right = self.crop[0] - seen.shape[0], self.crop[1] - seen.shape[1]
            seen = _change_channels(
                lambda part, fill: cv2.copyMakeBorder(part, 0, bottom, 0, right, cv2.BORDER_CONSTANT, value=fill),
                *(seen, self.fill),
            )
        return seen, self._warp_mask(mask, view.matrix)

    def mask(self, mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return the view of a mask (H, W) alone, equal to the mask of a call with the same `rng` state."""
        return self._warp_mask(mask, self.place(mask, rng))

    def maps(
        self,
        maps: Mapping[str, np.ndarray],
        kinds: Mapping[str, MapKind],
        mask: np.ndarray,
        rng: np.random.Generator,
    ) -> dict[str, np.ndarray]:
        """Return the views of maps (H, W) or (N, H, W), of the same pixels as a call with the same `rng` state.

        Args:
            maps: by name.
            kinds: of the maps, by name.
            mask: class ids (H, W), see `place`.
            rng: random generator.

        Raises:
            UserError: see `check_maps`; or a map holds distances, and the sides of the image change unequally.
        """
        self.check_maps(kinds)
        matrix, zoom, _ = self._geometry(mask, rng)
        return _warp_maps(maps, kinds, matrix, zoom, self.crop, self.ignore_index)

    def check_maps(self, kinds: Mapping[str, MapKind]) -> None:
        """Refuse maps that the geometry of the views would make wrong.

        Raises:
            UserError: one holds distances, and views are sheared.
        """
        lengths = [name for name, kind in kinds.items() if kind.is_length]
        if lengths and self.affine.shear > 0:
            raise UserError(
                f"affine.shear={self.affine.shear}: under shear, the distances of the map {lengths[0]} would depend on "
                "their direction. Set affine.shear=0, or leave this map out."
            )

    def place(self, mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return the matrix (3, 3) from image pixels (x, y, 1) to their positions in the view of the same call.

        The mask's values are read only for `cat_max_ratio`; otherwise only its size matters.
        """
        return self._geometry(mask, rng).matrix

    def scaled_size(self, size: tuple[int, int], factor: float) -> tuple[float, float]:
        """Return height and width of an image of `size` (H, W) scaled by a factor of the range `scale`, pixels."""
        limit = min(1.0, self.longest / max(size)) if self.longest else 1.0
        height, width = (max(1, round(side * limit)) for side in size)
        if self.relative_to == "image":
            return factor * height, factor * width
        if self.relative_to == "fit":  # whole products first, so that factor 1 gives the crop's side exactly
            crop, side = min((self.crop[0], height), (self.crop[1], width), key=lambda pair: pair[0] / pair[1])
            return max(1, int(factor * (crop * height) / side)), max(1, int(factor * (crop * width) / side))
        choose = max if self.relative_to == "long" else min
        side = choose(height, width)
        given = max(1, int(choose(self.crop) * factor))
        # rounds half up, as mmcv's `imrescale` does; Python's `round` would round to even
        return max(1, int(given * height / side + 0.5)), max(1, int(given * width / side + 0.5))

    def _geometry(self, mask: np.ndarray, rng: np.random.Generator) -> _View:
        """Return the geometry of a view, after up to `_CHECKS` new positions of its crop, and its random numbers."""
        uniforms, (height, width) = rng.random(_DRAWS), mask.shape[-2:]
        least, largest = self.scale
        is_log = self.distribution == "log_uniform"
        # log-uniform: an image is halved as often as it is doubled
        factor = least * (largest / least) ** uniforms[0] if is_log else least + (largest - least) * uniforms[0]
        scaled = self.scaled_size((height, width), factor)
        zoom = (scaled[0] / height, scaled[1] / width)
        colors, numbers = uniforms[8:], uniforms[1:8]
        view = _View(self._matrix((height, width), zoom, numbers), zoom, colors)
        if self.cat_max_ratio is None and not self.color.has_switches:
            return view
        # last, so that the numbers above do not depend on these settings
        return self._try_positions(mask, view, numbers, rng.random(SWITCHES + 2 * _CHECKS))

    def _try_positions(self, mask: np.ndarray, view: _View, numbers: np.ndarray, more: np.ndarray) -> _View:
        """Return a view with the switches of its colours, at the first position of its crop that is balanced.

        Args:
            mask: class ids.
            view: at the first position.
            numbers: random numbers of its matrix.
            more: further ones, of the switches and of new positions.
        """
        size, matrix = (mask.shape[-2], mask.shape[-1]), view.matrix
        for position in more[SWITCHES:].reshape(_CHECKS, 2):
            if self._is_balanced(mask, matrix):
                break
            numbers[4:6] = position
            matrix = self._matrix(size, view.zoom, numbers)
        return _View(matrix, view.zoom, np.concatenate([view.colors, more[:SWITCHES]]))

    def _is_balanced(self, mask: np.ndarray, matrix: np.ndarray) -> bool:
        """Return whether a view shows several classes, the largest with a share below `cat_max_ratio`, if it is set."""
        if self.cat_max_ratio is None:
            return True
        counts = cv2.calcHist([self._warp_mask(mask, matrix)], [0], None, [256], [0, 256]).ravel().astype(np.float64)
        counts[self.ignore_index] = 0
        return bool((counts > 0).sum() > 1 and counts.max() / counts.sum() < self.cat_max_ratio)

    def _warp_image(self, image: np.ndarray, view: _View) -> np.ndarray:
        """Return the view of an image; with padding=end without the rows and columns to be padded."""
        size, border = self.crop, cv2.BORDER_CONSTANT
        if self.padding == "end" and self.affine == Affine():
            height, width = (max(1, round(side * zoom)) for side, zoom in zip(image.shape[:2], view.zoom, strict=True))
            # replicated: bilinear interpolation would mix `fill` into the last row and column
            size, border = (min(self.crop[0], height), min(self.crop[1], width)), cv2.BORDER_REPLICATE
        image, matrix = self._reduce(image, view)
        return _change_channels(
            lambda part, fill: cv2.warpAffine(
                part, matrix[:2], size[::-1], flags=cv2.INTER_LINEAR, borderMode=border, borderValue=fill
            ),
            *(image, self.fill),
        )

    def _change_colors(self, image: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
        channels = image.shape[2]
        if channels == 3:
            return self.color(image, uniforms)
        if channels < 3:
            # a grey channel is changed as RGB of equal values, one of which is taken
            return image if channels == 2 else self.color(image.repeat(3, axis=2), uniforms)[..., :1]
        return np.dstack([self.color(np.ascontiguousarray(image[..., :3]), uniforms), image[..., 3:]])

    def _reduce(self, image: np.ndarray, view: _View) -> tuple[np.ndarray, np.ndarray]:
        """Return an image reduced to the size of its view, where `resample` demands it, and the matrix from there."""
        zoom = min(view.zoom)
        if self.resample == "bilinear" or zoom >= (_AREA_BELOW if self.resample == "area" else 1):
            return image, view.matrix
        (height, width), (vertical, horizontal) = image.shape[:2], view.zoom
        size = (max(1, round(width * horizontal)), max(1, round(height * vertical)))
        # the warp starts from the reduced image: its matrix undoes the reduction
        matrix = view.matrix @ np.linalg.inv(_resize((size[1] / height, size[0] / width)))
        if self.resample == "area":
            resized = _change_channels(
                lambda part, _: cv2.resize(part, size, interpolation=cv2.INTER_AREA), image, self.fill
            )
            return resized, matrix
        return self._reduce_antialiased(image, size, matrix)

    def _reduce_antialiased(
        self, image: np.ndarray, size: tuple[int, int], matrix: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the part of an image, reduced to `size` (W, H), that a view shows, and the matrix from there.

        `matrix` maps the whole reduced image to the view.
        """
        height, width = image.shape[:2]
        left, top, right, bottom = self._visible(matrix, size)
        # only the visible part is filtered; a box of the whole image gives it the same weights
        box = (left * width / size[0], top * height / size[1], right * width / size[0], bottom * height / size[1])
        planes = [image] if image.shape[2] == 3 and image.dtype == np.uint8 else np.moveaxis(image, 2, 0)
        shown = (right - left, bottom - top)
        parts = [np.asarray(Image.fromarray(each).resize(shown, Image.Resampling.BILINEAR, box)) for each in planes]
        return np.dstack(parts), matrix @ _move(left, top)  # a copy that can be written

    def _visible(self, matrix: np.ndarray, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """Return left, top, right and bottom of the part of an image of `size` (W, H) that a view is sampled from."""
        right, bottom = self.crop[1] - 1, self.crop[0] - 1
        corners = np.linalg.inv(matrix) @ [[0, right, 0, right], [0, 0, bottom, bottom], [1, 1, 1, 1]]
        # one pixel more on each side, which bilinear interpolation reads
        start = np.clip(np.floor(corners[:2].min(1)) - 1, 0, np.subtract(size, 1)).astype(int)
        end = np.clip(np.ceil(corners[:2].max(1)) + 2, start + 1, size).astype(int)
        return int(start[0]), int(start[1]), int(end[0]), int(end[1])

    def _warp_mask(self, mask: np.ndarray, matrix: np.ndarray) -> np.ndarray:
        if mask.ndim > 2:
            return np.stack([self._warp_mask(layer, matrix) for layer in mask])
        return cv2.warpAffine(
            mask,
            matrix[:2],
            self.crop[::-1],
            flags=cv2.INTER_NEAREST,
            borderMode=cv2.BORDER_CONSTANT,
            borderValue=(self.ignore_index,),
        )

    def _matrix(self, size: tuple[int, int], zoom: tuple[float, float], uniforms: np.ndarray) -> np.ndarray:
        """Return the matrix (3, 3) from image pixel centres (x, y, 1) to the crop."""
        height, width = size[0] * zoom[0], size[1] * zoom[1]
        crop_height, crop_width = self.crop
        turn, shift_x, shift_y = np.eye(3), 0.0, 0.0
        if self.affine != Affine():
            turn, shift_x, shift_y = self._turn_and_shift(width, height, 2 * uniforms[:4] - 1)
        flips, at_end = uniforms[6] < self.flip, self.padding == "end"
        if flips and at_end:
            turn = _mirror(width) @ turn
        if at_end:  # the crop starts at 0 in an image smaller than it
            height, width = max(height, crop_height), max(width, crop_width)
        start = _crop_start if self.relative_to == "image" else _whole_crop_start
        left, top = start(width - crop_width, uniforms[4]), start(height - crop_height, uniforms[5])
        matrix = _move(shift_x - left, shift_y - top) @ turn @ _resize(zoom)
        return _mirror(crop_width) @ matrix if flips and not at_end else matrix

    def _turn_and_shift(self, width: float, height: float, signed: np.ndarray) -> tuple[np.ndarray, float, float]:
        """Return the matrix that turns and slants a scaled image about its centre, and the shift to the right and down.

        Args:
            width: of the scaled image, pixels.
            height: of the scaled image, pixels.
            signed: (4,) random numbers in -1..1 for rotation, shear, and shift in x and y.
        """
        turn = _turn_and_slant(self.affine.degrees * signed[0], self.affine.shear * signed[1])
        centre_x, centre_y = (width - 1) / 2, (height - 1) / 2
        shift_x = self.affine.translate * signed[2] * min(width, self.crop[1])
        shift_y = self.affine.translate * signed[3] * min(height, self.crop[0])
        return _move(centre_x, centre_y) @ turn @ _move(-centre_x, -centre_y), shift_x, shift_y


def _warp_maps(
    maps: Mapping[str, np.ndarray],
    kinds: Mapping[str, MapKind],
    matrix: np.ndarray,
    zoom: tuple[float, float],
    size: tuple[int, int],
    ignore_index: int,
) -> dict[str, np.ndarray]:
    """Return the views of the maps (..., h, w) of an image.

    Args:
        maps: by name, at least one.
        kinds: of the maps, by name.
        matrix: (3, 3), from image pixel centres (x, y, 1) to those of the view.
        zoom: view pixels per image pixel, vertically and horizontally.
        size: (H, W) of the view.
        ignore_index: of the dataset.

    Raises:
        UserError: a map holds distances, and the zooms differ.
    """
    height, width = next(iter(maps.values())).shape[-2:]
    shown = _find_shown_pixels((height, width), matrix, size)
    views = {}
    for name, values in maps.items():
        kind, layers = kinds[name], values.reshape(-1, height, width)
        if kind.is_interpolated:
            view = np.stack([_warp_bilinear(layer, matrix, size) for layer in layers])
            view *= np.float32(kind.value_factor(zoom))
        else:
            view = layers.reshape(len(layers), height * width)[:, shown]
        view[:, shown < 0] = kind.fill_value(ignore_index)
        if kind.varies:
            view = view[view.any(axis=(1, 2))]  # layers whose objects the view does not show
        views[name] = view if kind.varies else view.reshape(*values.shape[:-2], *size)
    return views


def _find_shown_pixels(image: tuple[int, int], matrix: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return the index of the pixel of an image (h, w) that each pixel of the view shows, as in its mask; -1: none."""
    pixels = np.arange(image[0] * image[1], dtype=np.int32).reshape(*image, 1)
    # as bytes: OpenCV rounds positions in the same way only for images of one type, and masks are uint8
    shown = cv2.warpAffine(
        pixels.view(np.uint8),
        matrix[:2],
        size[::-1],
        flags=cv2.INTER_NEAREST,
        borderMode=cv2.BORDER_CONSTANT,
        borderValue=(255, 255, 255, 255),
    )
    return shown.view(np.int32)[..., 0]


def _warp_bilinear(layer: np.ndarray, matrix: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return the view of a map (h, w); at its border, the fill value outside is not mixed in."""
    return cv2.warpAffine(layer, matrix[:2], size[::-1], flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


def _change_channels(
    change: Callable[[np.ndarray, Sequence[int]], np.ndarray], image: np.ndarray, fill: Sequence[int]
) -> np.ndarray:
    """Return `change(image, fill)` of an image (H, W, C), where `fill` is the level of padded pixels of each channel.

    Args:
        change: of at most three channels.
        image: uint8 or uint16.
        fill: RGB, 0..255.
    """
    if image.shape[2] == 3 and image.dtype == np.uint8:
        return change(image, fill)
    return _by_three(change, image, fill)


def _by_three(
    change: Callable[[np.ndarray, Sequence[int]], np.ndarray], image: np.ndarray, fill: Sequence[int]
) -> np.ndarray:
    """Change three channels at a time, and the last ones alone; padded pixels of further ones get the mean of `fill`.

    OpenCV pads at most four channels with values of their own, and interpolates pairs of channels in coarse steps.
    """
    channels, mean = image.shape[2], round(sum(fill) / 3)
    levels = [*fill, *[mean] * (channels - 3)] if channels >= 3 else [mean] * channels
    if image.dtype != np.uint8:
        levels = [EXACT * level for level in levels]
    whole = channels - channels % 3
    parts = [slice(at, at + 3) for at in range(0, whole, 3)] + [slice(at, at + 1) for at in range(whole, channels)]
    return np.dstack([change(np.ascontiguousarray(image[..., part]), levels[part]) for part in parts])


def _whole_crop_start(room: float, uniform: float) -> float:
    """Return the start of a crop of an image of whole pixels, each possible start with the same probability."""
    whole = round(room)
    return min(0, whole) + int((abs(whole) + 1) * uniform)


def _crop_start(room: float, uniform: float) -> float:
    """Return the start of a crop in whole pixels; `room` is negative where the image is smaller than the crop."""
    return round(min(0.0, room) + abs(room) * uniform)


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


def _mirror(width: float) -> np.ndarray:
    return np.array([[-1.0, 0, width - 1], [0, 1, 0], [0, 0, 1]])
