"""A mask that a brush corrects, and how it is shown over its image."""

import io
from collections import deque
from typing import Any

import cv2
import numpy as np
from PIL import Image

from dinoseg.core.shapes import Palette
from dinoseg.data.classes.labels import Labels
from dinoseg.report.overlay import blend
from dinoseg.report.palette import lookup_table, palette_image

MAX_RADIUS = 100  # pixels, of the brush
_MAX_STROKES = 50  # that can be undone
_MAX_UNDO_BYTES = 2**25  # of their former pixels: two strokes across an image of 16 million pixels
_MAX_POINTS = 20_000  # of a stroke
_MAX_PAINTED = 10**9  # pixels of a stroke, each as often as it is painted; about a second
_COUNTED_AT_ONCE = 2**18  # pixels, which fit a core's cache as int64


class MaskEditor:
    """Editor of the class ids of an image.

    Args:
        mask: ids (H, W) uint8, which are copied.
        labels: names and colours of the ids.
    """

    def __init__(self, mask: np.ndarray, labels: Labels) -> None:
        self.mask = mask.copy()
        self.labels = labels
        self.counts = count_pixels(mask)  # of each id (256,)
        self.hidden: set[int] = set()  # ids where the image shows without a colour
        self._strokes: deque[tuple[slice, slice, np.ndarray]] = deque(maxlen=_MAX_STROKES)

    def paint(self, points: list[list[float]], radius: int, label: int) -> None:
        """Paint a round brush along a line.

        Args:
            points: x and y in pixels from the upper left corner; others than a page sends raise a `ValueError`.
            radius: of the brush, in pixels.
            label: painted id.
        """
        line = np.array(points, np.float64).reshape(-1, 2)[:_MAX_POINTS]
        if not np.isfinite(line).all():
            raise ValueError("A stroke has a point that is not finite.")
        radius = min(max(1, int(radius)), MAX_RADIUS)
        height, width = self.mask.shape
        line = np.clip(line, -2 * radius, [width + 2 * radius, height + 2 * radius])
        lengths = np.hypot(*np.diff(line, axis=0, prepend=line[:1]).T)
        line = line[: max(1, np.searchsorted(np.cumsum((lengths + 2 * radius) * 2 * radius), _MAX_PAINTED))]
        left, top = np.maximum(line.min(axis=0) - radius - 2, 0).astype(int)
        right, bottom = np.maximum(line.max(axis=0) + radius + 3, 0).astype(int)
        rows = slice(top, bottom)
        columns = slice(left, right)
        self._strokes.append((rows, columns, self.mask[rows, columns].copy()))
        while sum(former.nbytes for _, _, former in self._strokes) > _MAX_UNDO_BYTES:
            self._strokes.popleft()
        self.counts -= count_pixels(self.mask[rows, columns])
        pixels = np.round(line - 0.5).astype(int).tolist()  # the centre of the first pixel is at 0.5
        for start, end in zip([pixels[0], *pixels], pixels, strict=False):
            cv2.line(self.mask, start, end, (label,), thickness=2 * radius)
        self.counts += count_pixels(self.mask[rows, columns])

    def undo(self) -> None:
        """Undo the last stroke, if there is one."""
        if self._strokes:
            rows, columns, former = self._strokes.pop()
            self.counts += count_pixels(former) - count_pixels(self.mask[rows, columns])
            self.mask[rows, columns] = former

    def encode_layer(self) -> bytes:
        """Encode the visible classes as a PNG in their colours; hidden and black ones are transparent."""
        colors = lookup_table(self.labels.palette, self.labels.ignore_index)
        alpha = np.where(colors.any(axis=1), 255, 0).astype(np.uint8)
        alpha[list(self.hidden)] = 0
        return encode_mask(self.mask, [(int(r), int(g), int(b)) for r, g, b in colors], transparency=alpha.tobytes())

    def encode_overlay(self, shown: bytes, opacity: float) -> bytes:
        """Encode a JPEG of the image with the visible classes of the mask over it."""
        with Image.open(io.BytesIO(shown)) as image:
            return encode_image(self.draw(np.asarray(image), self.mask, opacity))

    def draw(self, image: np.ndarray, mask: np.ndarray, opacity: float) -> np.ndarray:
        """Return an image (H, W, 3) uint8 with the visible classes of a mask (H, W) uint8 over it."""
        palette = self.labels.palette
        drawn = blend(image, mask, palette, ignore_index=self.labels.ignore_index, opacity=opacity)
        is_hidden = np.isin(mask, list(self.hidden))
        drawn[is_hidden] = image[is_hidden]
        return drawn


def count_pixels(mask: np.ndarray) -> np.ndarray:
    """Return the number of pixels of each id (256,) of a mask (H, W) uint8."""
    # bincount converts its input to int64: a part at a time, which is also eight times as fast for 16 million pixels
    parts = np.array_split(mask.ravel(), 1 + mask.size // _COUNTED_AT_ONCE)
    return np.sum([np.bincount(part, minlength=256) for part in parts], axis=0)


def encode_mask(mask: np.ndarray, palette: Palette, **options: Any) -> bytes:
    """Encode class ids (H, W) uint8 as a PNG with a palette; `options` are Pillow's."""
    file = io.BytesIO()
    palette_image(mask, palette).save(file, format="PNG", compress_level=1, **options)
    return file.getvalue()


def encode_image(image: np.ndarray) -> bytes:
    """Encode an image (H, W, 3) uint8 as a JPEG to look at."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="JPEG", quality=92)
    return file.getvalue()
