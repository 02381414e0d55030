"""Images inside a page: cards of one image, with error maps of its predictions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from dinoseg.core.objects import Objects
from dinoseg.core.shapes import Palette
from dinoseg.report.overlay import blend, legend_of
from dinoseg.report.table import percent
from dinoseg.utils.wording import count_of

WRONG, RIGHT, BOTH_WRONG = (224, 46, 34), (70, 150, 255), (240, 196, 60)  # colour-blind safe
OUTLINES = {"found": RIGHT, "missed": WRONG, "invented": BOTH_WRONG}  # colours of objects
_DARKEST = 0.45  # brightness of a frame below an error map
_OPACITY = 0.6


@dataclass(frozen=True)
class EvaluatedImages:
    """Images of an evaluation with their classes.

    Args:
        classes: class names.
        palette: one colour per class.
        ignore_index: id of unlabelled pixels.
        unit: resampling unit of the intervals: `image`, or the name of a group of images, such as `video`.
        images: image names, in order.
        units: the unit of each image.
    """

    classes: Sequence[str]
    palette: Palette
    ignore_index: int
    unit: str
    images: Sequence[str]
    units: Sequence[str]

    def count_units(self) -> int:
        """Return the number of different units."""
        return len(set(self.units))


@dataclass(frozen=True)
class Shot:
    """An image with its masks, downscaled.

    Args:
        index: index of the image in its data set.
        score: mean IoU over the classes of the image, 0..1.
        frame: (H, W, 3) uint8.
        prediction: (H, W) uint8, or layers (K, H, W).
        reference: (H, W) uint8, or layers (K, H, W).
    """

    index: int
    score: float
    frame: np.ndarray
    prediction: np.ndarray
    reference: np.ndarray


@dataclass(frozen=True)
class ObjectShot:
    """An image with outlines of its objects, downscaled.

    Args:
        index: index of the image in its data set.
        numbers: of objects, by the names of `RowMetric.find_errors`.
        frame: (H, W, 3) uint8.
        outlines: (H, W, 3) uint8.
    """

    index: int
    numbers: Mapping[str, int]
    frame: np.ndarray
    outlines: np.ndarray


@dataclass(frozen=True)
class PairShot:
    """An image that two runs predict differently, downscaled.

    Args:
        name: name of the image.
        scores: of the image in both runs.
        frame: (H, W, 3) uint8.
        reference: (H, W) uint8.
        predictions: (H, W) uint8 of both runs.
    """

    name: str
    scores: tuple[float, float]
    frame: np.ndarray
    reference: np.ndarray
    predictions: tuple[np.ndarray, np.ndarray]


def prediction_card(shot: Shot, evaluated: EvaluatedImages) -> dict[str, Any]:
    """Return a card of an image: frame, prediction, reference and error map."""
    masks = {"prediction": shot.prediction, "reference": shot.reference}
    ignored = shot.reference == evaluated.ignore_index
    wrong = (shot.prediction != shot.reference) & ~ignored
    share = float(wrong.sum() / max((~ignored).sum(), 1))
    if wrong.ndim > 2:  # layers: wrong in any, ignored in all
        wrong, ignored = wrong.any(axis=0), ignored.all(axis=0)
    drawn = mark_pixels(shot.frame, [(wrong, WRONG), (ignored, (0, 0, 0))])
    card = _mask_card(shot.frame, masks, evaluated)
    card["panels"].append((f"errors: {percent(share)} % of the labelled pixels", drawn))
    return {"title": evaluated.images[shot.index], "summary": f"mIoU {percent(shot.score)} %", **card}


def object_card(shot: ObjectShot, evaluated: EvaluatedImages) -> dict[str, Any]:
    """Return a card of an image: the frame, and the outlines of its objects."""
    objects = count_of(shot.numbers["found"] + shot.numbers["missed"], "object")
    return {
        "title": evaluated.images[shot.index],
        "summary": f"{shot.numbers['missed']} of {objects} missed, {shot.numbers['invented']} invented",
        "panels": [("frame", shot.frame), ("objects", shot.outlines)],
        "legend": [*OUTLINES.items()],
    }


def outline_objects(frame: np.ndarray, found: Mapping[str, Objects]) -> np.ndarray:
    """Return a dark grey frame (h, w, 3), an image at any size, with the outlines of its objects by `OUTLINES`."""
    drawn = mark_pixels(frame, [])
    for name, colour in OUTLINES.items():
        objects = found[name]
        for runs in objects.masks:
            mask = runs.to_mask(objects.size).astype(np.uint8)
            resized = cv2.resize(mask, (frame.shape[1], frame.shape[0]), interpolation=cv2.INTER_NEAREST)
            contours, _ = cv2.findContours(resized, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
            cv2.drawContours(drawn, contours, -1, colour, 2)
    return drawn


def pair_card(shot: PairShot, sides: tuple[str, str], evaluated: EvaluatedImages, score: str) -> dict[str, Any]:
    """Return a card of an image: frame, reference, predictions of both sides, and a map of the correct ones.

    Args:
        shot: the image.
        sides: names of both sides.
        evaluated: the images of the evaluation.
        score: name of the scores.
    """
    masks = {"reference": shot.reference, **dict(zip(sides, shot.predictions, strict=True))}
    labelled = shot.reference != evaluated.ignore_index
    first, second = ((mask == shot.reference) & labelled for mask in shot.predictions)
    marks = [(second & ~first, RIGHT), (first & ~second, WRONG), (labelled & ~first & ~second, BOTH_WRONG)]
    before, after = shot.scores
    summary = f"{score} {percent(before)} % and {percent(after)} %: {percent(after - before, sign='+')} points"
    card = _mask_card(shot.frame, masks, evaluated)
    card["panels"].append(("which is correct", mark_pixels(shot.frame, marks)))
    return {"title": shot.name, "summary": summary, **card}


def _mask_card(frame: np.ndarray, masks: dict[str, np.ndarray], evaluated: EvaluatedImages) -> dict[str, Any]:
    """Return the frame, tinted frames by their captions, and the legend of all masks."""
    palette, ignore_index = evaluated.palette, evaluated.ignore_index
    tinted = [
        (caption, blend(frame, mask, palette, ignore_index=ignore_index, opacity=_OPACITY))
        for caption, mask in masks.items()
    ]
    legend = legend_of(list(masks.values()), evaluated.classes, palette, ignore_index=ignore_index)
    return {"panels": [("frame", frame), *tinted], "legend": legend}


def mark_pixels(frame: np.ndarray, marks: Sequence[tuple[np.ndarray, tuple[int, int, int]]]) -> np.ndarray:
    """Return a dark grey frame (H, W, 3) with colours where masks (H, W) are True."""
    grey = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
    drawn = np.repeat((grey * _DARKEST).astype(np.uint8)[..., None], 3, axis=2)
    for where, colour in marks:
        drawn[where] = colour
    return drawn
