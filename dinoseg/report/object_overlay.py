"""Figures of single objects over a frame: colours of their classes, outlines, and their numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw

from dinoseg.report.overlay import Colour, Legend, blend, default_outline, find_edges, load_font
from dinoseg.report.palette import layer_colours

if TYPE_CHECKING:  # imports torch, which drawing does not need
    from dinoseg.core.objects import Objects
    from dinoseg.core.shapes import Palette

_SMALLEST_TEXT = 10  # pixels
_WHITE, _BLACK = (255, 255, 255), (0, 0, 0)


def draw_prediction(
    frame: np.ndarray,
    mask: np.ndarray,
    objects: Objects | None,
    palette: Palette,
    *,
    ignore_index: int = 255,
    opacity: float = 0.5,
) -> np.ndarray:
    """Return a frame (H, W, 3) uint8 with its objects as `draw_objects` does; without any, with its classes.

    Args:
        frame: (H, W, 3) uint8.
        mask: class ids (H, W), or layers (K, H, W).
        objects: of the frame; None: the model predicts none.
        palette: a colour for each class.
        ignore_index: id of ignored pixels.
        opacity: of the colours, 0..1.
    """
    if objects is None:
        return blend(frame, mask, palette, ignore_index=ignore_index, opacity=opacity)
    return draw_objects(frame, objects, palette, opacity=opacity)


def draw_objects(frame: np.ndarray, objects: Objects, palette: Palette, *, opacity: float = 0.5) -> np.ndarray:
    """Return a frame (H, W, 3) uint8 tinted by objects, those of the best scores on top.

    Each has the colour of its class, an outline and its number, from 1 in the order of the objects. A class whose
    colour is black has a white outline, and leaves the frame unchanged at any opacity below 1.

    Args:
        frame: (H, W, 3) uint8.
        objects: of the frame, in the order of their scores.
        palette: a colour for each class.
        opacity: of the colours, 0..1.
    """
    drawn = frame.copy()
    colours = layer_colours(palette)
    width = default_outline(objects.size)
    owners = np.full(objects.size, -1)  # the object on top
    # of the image, with a margin: an outline costs as much as its object, and not as the image
    regions = [
        (slice(max(0, top - width), top + rows + width), slice(max(0, left - width), left + columns + width))
        for left, top, columns, rows in objects.boxes.tolist()
    ]
    for place, region in reversed([*enumerate(regions)]):
        mask = objects.masks[place].to_mask(objects.size)[region]
        label = int(objects.classes[place])
        owners[region][mask] = place
        if opacity == 1 or max(palette[label]):
            tinted = frame[region][mask] * (1 - opacity) + np.array(palette[label]) * opacity
            drawn[region][mask] = tinted.round().astype(np.uint8)
        drawn[region][mask & find_edges(mask, width)] = colours[label]
    picture = Image.fromarray(drawn)
    pen = ImageDraw.Draw(picture)
    font = load_font(max(_SMALLEST_TEXT, round(max(objects.size) / 40)))
    for place, region in enumerate(regions):
        own = owners[region] == place
        if own.any():
            row, column = _find_middle(own)
            middle = (column + region[1].start, row + region[0].start)
            pen.text(middle, str(place + 1), _WHITE, font, anchor="mm", stroke_width=width + 1, stroke_fill=_BLACK)
    return np.asarray(picture)


def object_legend(objects: Objects, classes: Sequence[str], palette: Palette) -> Legend:
    """Return (name, colour) of each class that `draw_objects` draws, in id order."""
    colours: list[Colour] = layer_colours(palette)
    return [(classes[label], colours[label]) for label in np.unique(objects.classes).tolist()]


def _find_middle(mask: np.ndarray) -> tuple[int, int]:
    """Return the row and column of a pixel of a mask (H, W) bool that is far from its border."""
    import cv2

    depth = cv2.distanceTransform(np.pad(mask, 1).astype(np.uint8), cv2.DIST_L2, 3)[1:-1, 1:-1]
    row, column = np.unravel_index(depth.argmax(), mask.shape)
    return int(row), int(column)
