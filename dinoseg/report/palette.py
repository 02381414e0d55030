"""Class colours: a default palette, a table of colours by class id, and palette images of ids."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from dinoseg.utils.atomic import atomic_file

if TYPE_CHECKING:
    from dinoseg.core.shapes import Palette

IGNORE_COLOUR = (224, 224, 192)
# Black, and eight colours whose smallest CIEDE2000 difference is largest for trichromats, deuteranopes and protanopes,
# found by a search. They differ by 14.9 at least, from black, IGNORE_COLOUR and the reds of tissue too.
_FIRST = (
    (0, 0, 0),
    (34, 119, 255),
    (204, 255, 0),
    (204, 0, 136),
    (204, 102, 0),
    (85, 255, 255),
    (34, 187, 255),
    (238, 119, 153),
    (221, 170, 102),
)
_LEVELS = 8  # per colour channel: the candidates of the further colours


def default_palette(num_classes: int) -> list[tuple[int, int, int]]:
    """Return `num_classes` (1..256) distinct colours; class 0 is black, which reads as "nothing here".

    The first nine also differ for deuteranopes and protanopes. Each further one is the candidate farthest from all
    previous colours, so a longer palette starts with any shorter one.
    """
    if num_classes <= len(_FIRST):
        return list(_FIRST[:num_classes])  # the search for the others takes 10 ms
    return list(_farthest_colours()[:num_classes])


def layer_colours(palette: Palette) -> list[tuple[int, int, int]]:
    """Return the colours of classes that may overlap: white instead of black, which stands for no class."""
    return [(255, 255, 255) if max(colour) == 0 else colour for colour in palette]


def lookup_table(palette: Palette, ignore_index: int = 255) -> np.ndarray:
    """Return the colour of each id 0..255 as (256, 3) uint8."""
    table = np.zeros((256, 3), dtype=np.uint8)
    table[: len(palette)] = palette
    table[ignore_index] = IGNORE_COLOUR
    return table


@lru_cache
def _farthest_colours() -> tuple[tuple[int, int, int], ...]:
    steps = np.linspace(0, 255, _LEVELS).round()
    candidates = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), axis=-1).reshape(-1, 3)
    bright = candidates.max(axis=1) >= 180
    vivid = np.ptp(candidates, axis=1) >= 70  # greys and pale tones vanish on a photograph
    candidates = candidates[bright & vivid]
    chosen = [np.array(colour, dtype=float) for colour in _FIRST]
    distance = np.min([_distance(candidates, colour) for colour in [*chosen, np.array(IGNORE_COLOUR)]], axis=0)
    while len(chosen) < 256:
        chosen.append(candidates[distance.argmax()])
        distance = np.minimum(distance, _distance(candidates, chosen[-1]))
    return tuple((int(red), int(green), int(blue)) for red, green, blue in chosen)


def _distance(colours: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """Return perceived distances: RGB weighted by mean redness (T. Riemersma's "Colour metric")."""
    redness = (colours[:, 0] + colour[0]) / 2 / 256
    weights = np.stack([2 + redness, np.full_like(redness, 4), 3 - redness], axis=1)
    return np.sqrt((weights * (colours - colour) ** 2).sum(axis=1))


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
    """Return ids (H, W) uint8 as a palette image; the default palette is PASCAL VOC's. Other ids look ignored."""
    colours = [*(palette or voc_palette())]
    # with fewer colours than ids, Pillow stores too few bits of each id
    colours += [IGNORE_COLOUR] * (int(ids.max(initial=0)) + 1 - len(colours))
    picture = Image.fromarray(ids)
    picture.putpalette([level for colour in colours for level in colour])
    return picture


def write_indexed_png(path: str | Path, ids: np.ndarray, palette: Palette | None = None) -> None:
    """Write ids (H, W) uint8 atomically as a palette PNG; the default palette is PASCAL VOC's."""
    with atomic_file(Path(path)) as part:
        palette_image(ids, palette).save(part, format="PNG", compress_level=1)


def _channel(bits: int) -> int:
    """Return a colour level 0..255 from bits 0, 3 and 6, where the lowest bit is the most significant."""
    return sum((bits >> 3 * level & 1) << 7 - level for level in range(3))
