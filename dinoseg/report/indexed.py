"""Palette images of object-id masks, in the format of PASCAL VOC, DAVIS and YouTube-VOS."""

from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from dinoseg.core.shapes import Palette
from dinoseg.utils.atomic import atomic_file


@lru_cache
def voc_palette() -> tuple[tuple[int, int, int], ...]:
    """Return PASCAL VOC's 256 colours.

    Bits 0, 3 and 6 of an id give red from its highest bit down; bits 1, 4 and 7 give green, and so on.
    """
    return tuple(
        (_channel(index), _channel(index >> 1), _channel(index >> 2))  # red, green, blue
        for index in range(256)
    )


def palette_image(ids: np.ndarray, palette: Palette | None = None) -> Image.Image:
    """Return ids (H, W) uint8 as a palette image; the default palette is PASCAL VOC's."""
    picture = Image.fromarray(ids)
    picture.putpalette([level for colour in palette or voc_palette() for level in colour])
    return picture


def write_indexed_png(path: str | Path, ids: np.ndarray, palette: Palette | None = None) -> None:
    """Write ids (H, W) uint8 atomically as a palette PNG; the default palette is PASCAL VOC's."""
    with atomic_file(Path(path)) as part:
        palette_image(ids, palette).save(part, format="PNG", compress_level=1)


def _channel(bits: int) -> int:
    """Return a colour level 0..255 from bits 0, 3 and 6, where the lowest bit is the most significant."""
    return sum((bits >> 3 * level & 1) << 7 - level for level in range(3))
