"""Figures of single objects over a frame: their colours, outlines of their classes, and their numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw

from dinoseg.report.overlay import Colour, Legend, blend, default_outline, find_edges, load_font
from dinoseg.report.palette import default_palette, layer_colours

if TYPE_CHECKING:  # imports torch, which drawing does not need
    from dinoseg.core.objects import Objects
    from dinoseg.core.shapes import Palette

_SMALLEST_TEXT = 10  # pixels
_OWN_COLOURS = 12  # of objects of one class
_NEAR = 0.05  # share of the longer side: boxes that are closer belong to neighbours
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


def draw_objects(
    frame: np.ndarray,
    objects: Objects,
    palette: Palette,
    *,
    opacity: float = 0.5,
    ids: Sequence[int] | None = None,
) -> np.ndarray:
    """Return a frame (H, W, 3) uint8 tinted by objects, those of the best scores on top.

    Each has an outline in the colour of its class, and its number, from 1 in the order of the objects, unless that
    would cover another number. The only object of a class is tinted in the colour of the class; of several, each has a
    colour of its own, which differs from those of its neighbours. A class whose colour is black has a white outline,
    and its only object leaves the frame unchanged at any opacity below 1.

    Args:
        frame: (H, W, 3) uint8.
        objects: of the frame, in the order of their scores.
        palette: a colour for each class.
        opacity: of the colours, 0..1.
        ids: numbers from 1 of the objects of a video, which also determine their colours; None: numbers and colours are
            those of the frame alone.
    """
    drawn = frame.copy()
    outlines = layer_colours(palette)
    tints = colour_objects(objects, palette) if ids is None else [default_palette(256)[number] for number in ids]
    width = default_outline(objects.size)
    owners = np.full(objects.size, -1)  # the object on top
    # of the image, with a margin: an outline costs as much as its object, and not as the image
    regions = [
        (slice(max(0, top - width), top + rows + width), slice(max(0, left - width), left + columns + width))
        for left, top, columns, rows in objects.boxes.tolist()
    ]
    for place, region in reversed([*enumerate(regions)]):
        mask = objects.masks[place].to_mask(objects.size)[region]
        owners[region][mask] = place
        if opacity == 1 or max(tints[place]):
            tinted = frame[region][mask] * (1 - opacity) + np.array(tints[place]) * opacity
            drawn[region][mask] = tinted.round().astype(np.uint8)
        drawn[region][mask & find_edges(mask, width)] = outlines[int(objects.classes[place])]
    picture = Image.fromarray(drawn)
    pen = ImageDraw.Draw(picture)
    style: dict[str, Any] = {
        "font": load_font(max(_SMALLEST_TEXT, round(max(objects.size) / 40))),
        "anchor": "mm",
        "stroke_width": width + 1,
    }
    taken = np.empty((0, 4), int)  # left, top, right and bottom of each number
    for place, (text, region) in enumerate(zip(map(str, ids or range(1, len(regions) + 1)), regions, strict=True)):
        own = owners[region] == place
        corner = np.array([region[1].start, region[0].start])
        box = np.array(pen.textbbox((0, 0), text, **style), int)
        middle = _find_middle(own, box, taken - np.tile(corner, 2))
        if middle is not None:
            taken = np.vstack([taken, box + np.tile(corner + middle, 2)])
            pen.text(tuple(corner + middle), text, _WHITE, stroke_fill=_BLACK, **style)
    return np.asarray(picture)


def colour_objects(objects: Objects, palette: Palette) -> list[Colour]:
    """Return the colour of each object: that of its class for the only one, else one of its own.

    Own colours are none of single objects; of these, each object has one that its neighbours have least.
    """
    tints = [(int(red), int(green), int(blue)) for red, green, blue in palette]
    labels, numbers = np.unique(objects.classes, return_counts=True)
    single = {label: tints[label] for label in labels[numbers == 1].tolist()}
    own = [colour for colour in default_palette(1 + _OWN_COLOURS)[1:] if colour not in single.values()]
    boxes = objects.boxes
    starts, ends = boxes[:, :2] - _NEAR * max(objects.size), boxes[:, :2] + boxes[:, 2:]
    is_single = np.isin(objects.classes, [*single])
    chosen = np.zeros(len(objects), np.int64)  # places in `own`
    for place in np.flatnonzero(~is_single):
        near = (starts[place] < ends[:place]).all(axis=1) & (starts[:place] < ends[place]).all(axis=1)
        nearby, used = (np.bincount(chosen[:place][which], minlength=len(own)) for which in (near, ~is_single[:place]))
        chosen[place] = np.lexsort((used, nearby))[0]
    return [single.get(label) or own[place] for label, place in zip(objects.classes.tolist(), chosen, strict=True)]


def object_legend(objects: Objects, classes: Sequence[str], palette: Palette) -> Legend:
    """Return (name, colour) of each class that `draw_objects` draws, in id order."""
    colours: list[Colour] = layer_colours(palette)
    return [(classes[label], colours[label]) for label in np.unique(objects.classes).tolist()]


def _find_middle(mask: np.ndarray, box: np.ndarray, taken: np.ndarray) -> np.ndarray | None:
    """Return a pixel (x, y) of a mask (H, W) bool far from its border, around which a box covers no other one.

    Args:
        mask: of an object.
        box: left, top, right and bottom, relative to the pixel.
        taken: other boxes (N, 4), in the mask's coordinates.

    Returns:
        None if there is no such pixel.
    """
    import cv2

    depth = cv2.distanceTransform(np.pad(mask, 1).astype(np.uint8), cv2.DIST_L2, 3)[1:-1, 1:-1]
    # pixels around which the box would cover another one
    starts, ends = np.maximum(taken[:, :2] - box[2:] + 1, 0), taken[:, 2:] - box[:2]
    reached = (ends > 0).all(axis=1) & (starts < mask.shape[::-1]).all(axis=1)
    for (left, top), (right, bottom) in zip(starts[reached], ends[reached], strict=True):
        depth[top:bottom, left:right] = 0
    if not depth.any():
        return None
    row, column = np.unravel_index(depth.argmax(), mask.shape)
    return np.array([column, row])
