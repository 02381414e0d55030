"""Masks of object ids as palette pictures, as PASCAL VOC, DAVIS and YouTube-VOS publish and expect them."""

from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from dinoseg.core.shapes import Palette
from dinoseg.utils.atomic import whole_file


@lru_cache
def voc_palette() -> tuple[tuple[int, int, int], ...]:
    """Return PASCAL VOC's 256 colours: bits 0, 3, 6 of an id make red from its highest bit down, 1, 4, 7 green, ..."""
    return tuple(
        (_channel(index), _channel(index >> 1), _channel(index >> 2))  # red, green, blue
        for index in range(256)
    )


def indexed(ids: np.ndarray, palette: Palette | None = None) -> Image.Image:
    """Return ids (H, W) uint8 as a picture with a palette, PASCAL VOC's unless given."""
    picture = Image.fromarray(ids)
    picture.putpalette([level for colour in palette or voc_palette() for level in colour])
    return picture


def write_indexed_png(path: str | Path, ids: np.ndarray, palette: Palette | None = None) -> None:
    """Write ids (H, W) uint8 as a picture with a palette, PASCAL VOC's unless given; whole or not at all."""
    with whole_file(Path(path)) as part:
        indexed(ids, palette).save(part, format="PNG", compress_level=1)


def _channel(bits: int) -> int:
    """Return a colour's level 0..255 from bits 0, 3 and 6, the lowest of which counts most."""
    return sum((bits >> 3 * level & 1) << 7 - level for level in range(3))
