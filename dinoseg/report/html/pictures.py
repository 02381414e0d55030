"""Images inside a page: data URIs of bounded size, side by side, with error maps of the predictions."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image

from dinoseg.core.shapes import Palette
from dinoseg.report.html.page import percent, text
from dinoseg.report.overlay import Legend, blend, legend_of

WRONG, RIGHT, BOTH_WRONG = (224, 46, 34), (70, 150, 255), (240, 196, 60)  # colour-blind safe
_QUALITY = 82
_DARKEST = 0.45  # brightness of a frame below an error map


def data_uri(pixels: np.ndarray) -> str:
    """Return an image (H, W, 3) uint8 as a WebP data URI; (H, W, 4) as a PNG data URI."""
    lossless = pixels.shape[2] == 4
    kind, options = ("png", {}) if lossless else ("webp", {"quality": _QUALITY, "method": 4})
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def panels(shown: Sequence[tuple[str, np.ndarray]], about: str) -> str:
    """Return images (H, W, 3) side by side; on a phone, one below the other.

    Args:
        shown: caption and pixels of each image.
        about: description of all images, plain text, for screen readers.
    """
    figures = (
        f'<figure><img alt="{text(f"{about}: {caption}")}" width="{pixels.shape[1]}" height="{pixels.shape[0]}" '
        f'src="{data_uri(pixels)}" decoding="async"><figcaption>{text(caption)}</figcaption></figure>'
        for caption, pixels in shown
    )
    return f'<div class="panels">{"".join(figures)}</div>'


def card(title: str, summary: str, shown: Sequence[tuple[str, np.ndarray]], legend: Legend = ()) -> str:
    """Return a card of one image: name, a line about it, panels and a legend of its classes; all texts are plain."""
    entries = "".join(
        f'<li><span class="swatch" style="background: rgb({red}, {green}, {blue})"></span>{text(name)}</li>'
        for name, (red, green, blue) in legend
    )
    classes = f'<ul class="legend">{entries}</ul>' if entries else ""
    head = f"<h3>{text(title)}</h3><p>{text(summary)}</p>"
    return f'<div class="shot">{head}{panels(shown, title)}{classes}</div>'


def error_map(frame: np.ndarray, wrong: np.ndarray, ignored: np.ndarray) -> np.ndarray:
    """Return a dark grey frame with wrong pixels (True, (H, W)) in red and ignored pixels in black."""
    return marked(frame, [(wrong, WRONG), (ignored, (0, 0, 0))])


def marked(frame: np.ndarray, marks: Sequence[tuple[np.ndarray, tuple[int, int, int]]]) -> np.ndarray:
    """Return a dark grey frame (H, W, 3) with colours where masks (H, W) are True."""
    grey = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
    drawn = np.repeat((grey * _DARKEST).astype(np.uint8)[..., None], 3, axis=2)
    for where, colour in marks:
        drawn[where] = colour
    return drawn


@dataclass(frozen=True)
class Shot:
    """An image with its masks, downscaled.

    Args:
        index: index of the image in its data set.
        score: mean IoU over the classes of the image, 0..1.
        frame: (H, W, 3) uint8.
        prediction: (H, W) uint8.
        reference: (H, W) uint8.
    """

    index: int
    score: float
    frame: np.ndarray
    prediction: np.ndarray
    reference: np.ndarray


def prediction_card(
    shot: Shot, name: str, *, classes: Sequence[str], palette: Palette, ignore_index: int, summary: str = ""
) -> str:
    """Return a card of an image: frame, prediction, reference and error map."""
    masks = {"prediction": shot.prediction, "reference": shot.reference}
    tinted = [
        (caption, blend(shot.frame, mask, palette, ignore_index=ignore_index, opacity=0.6))
        for caption, mask in masks.items()
    ]
    ignored = shot.reference == ignore_index
    wrong = (shot.prediction != shot.reference) & ~ignored
    share = wrong.sum() / max((~ignored).sum(), 1)
    errors = (f"errors: {percent(float(share))} % of the labelled pixels", error_map(shot.frame, wrong, ignored))
    legend = legend_of(list(masks.values()), classes, palette, ignore_index=ignore_index)
    return card(name, summary or f"mIoU {percent(shot.score)} %", [("frame", shot.frame), *tinted, errors], legend)
