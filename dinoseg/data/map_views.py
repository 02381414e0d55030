"""Views of the maps of a sample, which show the same pixels as the view of its mask."""

from collections.abc import Mapping

import cv2
import numpy as np

from dinoseg.core.sample_maps import MapKind


def warp_maps(
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
            view = layers.reshape(len(layers), -1)[:, shown]
        view[:, shown < 0] = kind.fill_value(ignore_index)
        views[name] = view.reshape(*values.shape[:-2], *size)
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
