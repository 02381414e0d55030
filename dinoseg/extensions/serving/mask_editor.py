"""A mask that a brush corrects, and how it is shown over its image."""

import io
from collections import deque
from typing import Any

import cv2
import numpy as np
from PIL import Image

from dinoseg.core.shapes import Palette
from dinoseg.data.classes.labels import Labels
from dinoseg.report.overlay import blend, hatch
from dinoseg.report.palette import lookup_table, palette_image

MAX_RADIUS = 100  # pixels, of the brush
_MAX_STROKES = 50  # that can be undone
_MAX_UNDO_BYTES = 2**25  # of their former pixels: two strokes across an image of 16 million pixels
_MAX_POINTS = 20_000  # of a stroke
_MAX_PAINTED = 10**9  # pixels of a stroke, each as often as it is painted; about a second
_COUNTED_AT_ONCE = 2**18  # pixels, which fit a core's cache as int64


class MaskEditor:
    """Editor of the class ids of an image, or of a layer for each class.

    Args:
        mask: ids (H, W) uint8, or layers (K, H, W) of 0 and 1, which are copied.
        labels: names and colours of the ids.
        marks: (H, W) bool, pixels of the image that are not covered by colours; only of a mask of ids.
    """

    def __init__(self, mask: np.ndarray, labels: Labels, marks: np.ndarray | None = None) -> None:
        self.mask = mask.copy()
        self.labels = labels
        self._marks = marks
        self.counts = count_pixels(mask)  # of each class (256,)
        self.hidden: set[int] = set()  # ids where the image shows without a colour
        self._strokes: deque[tuple[int, slice, slice, np.ndarray]] = deque(maxlen=_MAX_STROKES)

    @property
    def has_layers(self) -> bool:
        """Return whether each class has a layer."""
        return self.mask.ndim > 2

    def paint(self, points: list[list[float]], radius: int, label: int, *, erase: bool = False) -> None:
        """Paint a round brush along a line.

        Args:
            points: x and y in pixels from the upper left corner; others than a page sends raise a `ValueError`.
            radius: of the brush, in pixels.
            label: painted id, or the painted layer.
            erase: remove the class from its layer.
        """
        line = np.array(points, np.float64).reshape(-1, 2)[:_MAX_POINTS]
        if not np.isfinite(line).all():
            raise ValueError("A stroke has a point that is not finite.")
        radius = min(max(1, int(radius)), MAX_RADIUS)
        plane = self._plane(label)
        height, width = plane.shape
        line = np.clip(line, -2 * radius, [width + 2 * radius, height + 2 * radius])
        lengths = np.hypot(*np.diff(line, axis=0, prepend=line[:1]).T)
        line = line[: max(1, np.searchsorted(np.cumsum((lengths + 2 * radius) * 2 * radius), _MAX_PAINTED))]
        left, top = np.maximum(line.min(axis=0) - radius - 2, 0).astype(int)
        right, bottom = np.maximum(line.max(axis=0) + radius + 3, 0).astype(int)
        rows = slice(top, bottom)
        columns = slice(left, right)
        former = plane[rows, columns].copy()
        self._strokes.append((label, rows, columns, former))
        while sum(each[-1].nbytes for each in self._strokes) > _MAX_UNDO_BYTES:
            self._strokes.popleft()
        value = int(not erase) if self.has_layers else label
        pixels = np.round(line - 0.5).astype(int).tolist()  # the centre of the first pixel is at 0.5
        for start, end in zip([pixels[0], *pixels], pixels, strict=False):
            cv2.line(plane, start, end, (value,), thickness=2 * radius)
        self._update_counts(label, former, plane[rows, columns])

    def undo(self) -> None:
        """Undo the last stroke, if there is one."""
        if self._strokes:
            label, rows, columns, former = self._strokes.pop()
            plane = self._plane(label)
            self._update_counts(label, plane[rows, columns], former)
            plane[rows, columns] = former

    def _plane(self, label: int) -> np.ndarray:
        """Return the pixels (H, W) that a stroke of a class changes, as a view."""
        return np.asarray(self.mask[label]) if self.has_layers else self.mask

    def _update_counts(self, label: int, former: np.ndarray, new: np.ndarray) -> None:
        if self.has_layers:
            self.counts[label] += np.count_nonzero(new) - np.count_nonzero(former)
        else:
            self.counts += count_pixels(new) - count_pixels(former)

    def encode_layer(self) -> bytes:
        """Encode the visible classes as a PNG in their colours; hidden and black ones are transparent.

        Overlapping classes are hatched.
        """
        mask = self.mask
        no_class = len(self.labels.classes)  # may be the ignored id, which no pixel of these masks has
        transparent = [*self.hidden]
        if self._marks is not None:
            mask = np.where(self._marks, np.uint8(no_class), mask)
            transparent.append(no_class)
        if self.has_layers:
            mask = hatch(list(self._drop_hidden(mask) > 0)).astype(np.uint8)  # K: no class
            transparent.append(no_class)
        colors = lookup_table(self.labels.palette, self.labels.ignore_index)
        alpha = np.where(colors.any(axis=1), 255, 0).astype(np.uint8)
        alpha[transparent] = 0
        return encode_mask(mask, [(int(r), int(g), int(b)) for r, g, b in colors], transparency=alpha.tobytes())

    def encode_overlay(self, shown: bytes, opacity: float) -> bytes:
        """Encode a JPEG of the image with the visible classes of the mask over it."""
        with Image.open(io.BytesIO(shown)) as image:
            return encode_image(self.draw(np.asarray(image), self.mask, opacity))

    def draw(self, image: np.ndarray, mask: np.ndarray, opacity: float) -> np.ndarray:
        """Return an image (H, W, 3) uint8 with the visible classes of a mask (H, W) or (K, H, W) uint8 over it."""
        palette = self.labels.palette
        if self.has_layers:
            return blend(image, self._drop_hidden(mask), palette, opacity=opacity)
        drawn = blend(image, mask, palette, ignore_index=self.labels.ignore_index, opacity=opacity)
        is_hidden = np.isin(mask, list(self.hidden))
        if self._marks is not None:
            is_hidden |= self._marks
        drawn[is_hidden] = image[is_hidden]
        return drawn

    def _drop_hidden(self, layers: np.ndarray) -> np.ndarray:
        """Return layers (K, H, W) with zeros for hidden classes."""
        shown = layers.copy()
        shown[list(self.hidden)] = 0
        return shown


def count_pixels(mask: np.ndarray) -> np.ndarray:
    """Return the number of pixels of each class (256,) of a mask (H, W) of ids, or (K, H, W) of 0 and 1, uint8."""
    if mask.ndim > 2:
        counts = np.zeros(256, np.int64)
        counts[: len(mask)] = np.count_nonzero(mask, axis=(1, 2))
        return counts
    # bincount converts its input to int64: a part at a time, which is also eight times as fast for 16 million pixels
    parts = np.array_split(mask.ravel(), 1 + mask.size // _COUNTED_AT_ONCE)
    return np.sum([np.bincount(part, minlength=256) for part in parts], axis=0)


def encode_mask(mask: np.ndarray, palette: Palette, **options: Any) -> bytes:
    """Encode class ids (H, W) uint8 as a PNG with a palette, and layers (K, H, W) as a TIFF with a page for each.

    `data=folder` reads either. `options` are Pillow's.
    """
    file = io.BytesIO()
    if mask.ndim > 2:
        first, *others = map(Image.fromarray, mask)
        first.save(file, format="TIFF", save_all=True, append_images=others, compression="tiff_adobe_deflate")
        return file.getvalue()
    palette_image(mask, palette).save(file, format="PNG", compress_level=1, **options)
    return file.getvalue()


def encode_image(image: np.ndarray) -> bytes:
    """Encode an image (H, W, 3) uint8 as a JPEG to look at."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="JPEG", quality=92)
    return file.getvalue()
