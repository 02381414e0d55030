"""Figures of class colours over a frame, and of frames side by side with captions and a legend."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dinoseg.report.palette import IGNORE_COLOUR, lookup_table
from dinoseg.utils.levels import to_display

if TYPE_CHECKING:  # imports torch, which drawing does not need
    from dinoseg.core.shapes import Palette

Colour = tuple[int, int, int]
Legend = Sequence[tuple[str, Colour]]  # names and colours
_SMALLEST_PANEL = 300  # pixels: smaller frames are enlarged by an integer factor
_INK, _PAPER, _EDGE = (20, 20, 20), (255, 255, 255), (150, 150, 150)


def blend(
    frame: np.ndarray,
    mask: np.ndarray,
    palette: Palette,
    *,
    ignore_index: int = 255,
    opacity: float = 0.5,
    outline: int | None = 0,
) -> np.ndarray:
    """Tint a frame (H, W, 3) by the classes of `mask` (H, W); `opacity` 0..1, 1 = colours only.

    Classes whose colour is black leave the frame unchanged, at any opacity below 1. Layers (K, H, W) are hatched in
    the colours of their classes where these overlap, and always outlined.

    Args:
        frame: (H, W, 3) uint8.
        mask: class ids (H, W), or layers (K, H, W) of 0, 1 and `ignore_index`.
        palette: one colour per class.
        ignore_index: id of ignored pixels.
        opacity: opacity of the colours.
        outline: width in pixels of the outline inside each region of a mask (H, W); None: by the frame's size.
    """
    if mask.ndim > 2:
        return _blend_layers(frame, mask, palette, ignore_index, opacity)
    table = lookup_table(palette, ignore_index)
    drawn = _tint(frame, mask, table, opacity)
    width = default_outline(frame.shape[:2]) if outline is None else outline
    if width:
        edges = find_edges(mask, width) & (table.max(axis=1) > 0).take(mask)
        drawn[edges] = table[mask[edges]]
    return drawn


def default_outline(size: tuple[int, int]) -> int:
    """Return the width in pixels of outlines that are visible in a frame of this height and width."""
    return max(1, round(max(size) / 400))


def find_edges(ids: np.ndarray, width: int) -> np.ndarray:
    """Return where ids (H, W) have another id at most `width` pixels to the left, right, above or below, as bool."""
    edges = np.zeros(ids.shape, bool)
    for axis, shift in product((0, 1), range(1, width + 1)):
        along, found = (np.swapaxes(values, 0, axis) for values in (ids, edges))  # views
        differs = along[shift:] != along[:-shift]
        found[shift:] |= differs
        found[:-shift] |= differs
    return edges


def _tint(frame: np.ndarray, ids: np.ndarray, table: np.ndarray, opacity: float) -> np.ndarray:
    """Return a frame (H, W, 3) mixed with the colours `table[ids]`; below opacity 1, black leaves it unchanged."""
    plain = (table.max(axis=1) == 0) & (opacity < 1)
    colours = table.take(ids, axis=0)
    try:
        import cv2
    except ImportError:  # fallback for inference with numpy alone
        tinted = (frame * np.float32(1 - opacity) + colours * np.float32(opacity)).round().astype(np.uint8)
        return np.where(plain.take(ids)[..., None], frame, tinted)
    tinted = np.asarray(cv2.addWeighted(frame, 1 - opacity, colours, opacity, 0))
    return np.asarray(cv2.copyTo(frame, plain.astype(np.uint8).take(ids), tinted))


def _blend_layers(
    frame: np.ndarray, layers: np.ndarray, palette: Palette, ignore_index: int, opacity: float
) -> np.ndarray:
    height, width = layers.shape[1:]
    table = np.array([*palette, IGNORE_COLOUR, (0, 0, 0)], np.uint8)  # black stands for no class
    outline = default_outline((height, width))
    present = [layer == 1 for layer in layers] + [(layers == ignore_index).any(axis=0)]
    drawn = _tint(frame, hatch(present), table, opacity)
    edges = hatch([here & find_edges(here, outline) for here in present])
    is_edge = edges < len(present)
    drawn[is_edge] = table[edges[is_edge]]
    return drawn


def hatch(layers: Sequence[np.ndarray]) -> np.ndarray:
    """Return the index of a layer (H, W) bool that holds the pixel, in turns from stripe to stripe; else their number.

    Stripes are diagonal. A pixel of n layers takes the one whose rank among these is its stripe modulo n.
    """
    height, width = layers[0].shape
    rows, columns = np.ogrid[:height, :width]
    stripes = ((rows + columns) // (4 * default_outline((height, width)))).astype(np.uint16)
    count = np.sum(layers, axis=0, dtype=np.uint16)
    turn = stripes % np.maximum(count, 1)
    chosen = np.full_like(count, len(layers))
    rank = np.zeros_like(count)
    for index, here in enumerate(layers):
        chosen[here & (rank == turn)] = index
        rank += here
    return chosen


def compare(
    frame: np.ndarray,
    prediction: np.ndarray,
    reference: np.ndarray | None = None,
    *,
    classes: Sequence[str],
    palette: Palette,
    ignore_index: int = 255,
    opacity: float = 0.6,
    longest: int | None = None,
) -> np.ndarray:
    """Return frame (H, W, C) | prediction | reference (if given) with captions and a legend of the classes present.

    Frames with more than `longest` pixels on their longer side are downscaled to `longest`.
    """
    masks = {"prediction": prediction} | ({} if reference is None else {"reference": reference})
    frame = downscale(to_display(frame), longest)
    masks = {caption: downscale_mask(mask, longest) for caption, mask in masks.items()}
    panels = [("frame", frame)]
    for caption, mask in masks.items():
        tinted = blend(frame, mask, palette, ignore_index=ignore_index, opacity=opacity)
        panels.append((caption, tinted))
    legend = legend_of(list(masks.values()), classes, palette, ignore_index=ignore_index)
    return side_by_side(panels, legend)


def downscale(pixels: np.ndarray, longest: int | None) -> np.ndarray:
    """Return a frame (H, W, 3), or ids (H, W) without mixing them, downscaled to at most `longest` pixels a side."""
    import cv2

    height, width = pixels.shape[:2]
    if longest is None or max(height, width) <= longest:
        return pixels
    factor = longest / max(height, width)
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    return np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA if pixels.ndim == 3 else cv2.INTER_NEAREST))


def downscale_mask(mask: np.ndarray, longest: int | None) -> np.ndarray:
    """Return ids (H, W) or layers (K, H, W) downscaled as `downscale` does."""
    return downscale(mask, longest) if mask.ndim == 2 else np.stack([downscale(layer, longest) for layer in mask])


def legend_of(
    masks: Sequence[np.ndarray], classes: Sequence[str], palette: Palette, *, ignore_index: int = 255
) -> Legend:
    """Return (name, palette colour) of each class present in the masks, in id order; "ignored" comes last.

    A black class is black in the legend although `blend` leaves the frame unchanged there, so that legends agree.
    """
    present = set().union(*(_shown_ids(mask, ignore_index) for mask in masks))
    entries: list[tuple[str, Colour]] = []
    for index in sorted(present - {ignore_index}):
        red, green, blue = (int(level) for level in palette[index])
        entries.append((classes[index], (red, green, blue)))
    return entries + ([("ignored", IGNORE_COLOUR)] if ignore_index in present else [])


def _shown_ids(mask: np.ndarray, ignore_index: int) -> list[int]:
    """Return the IDs of the classes in a mask (H, W) or (K, H, W), and ignore_index if pixels are ignored."""
    if mask.ndim == 2:
        return np.unique(mask).tolist()
    present = np.flatnonzero((mask == 1).any(axis=(1, 2))).tolist()
    return [*present, ignore_index] if (mask == ignore_index).any() else present


def side_by_side(panels: Sequence[tuple[str, np.ndarray]], legend: Legend = ()) -> np.ndarray:
    """Lay out (caption, frame) pairs of one size side by side on white, with the wrapped legend below."""
    height, width = panels[0][1].shape[:2]
    factor = _enlargement(height, width)
    height, width = height * factor, width * factor
    size = max(14, round(min(0.016 * width * len(panels), 0.1 * height)))  # font size in pixels
    font = load_font(size)
    gap = size // 2
    column = max([width, *(_text_width(font, caption) for caption, _ in panels)])
    rows = _legend_rows(legend, font, size, len(panels) * (column + gap) - gap)
    line = round(1.6 * size)
    widths = [_row_width(row, font, size) for row in rows]
    total = max([len(panels) * (column + gap) - gap, *widths]) + 2 * gap
    canvas = Image.new("RGB", (total, line + height + gap + line * len(rows) + gap // 2), _PAPER)
    draw = ImageDraw.Draw(canvas)
    for index, (caption, frame) in enumerate(panels):
        left = gap + index * (column + gap)
        draw.text((left, line / 2), caption, fill=_INK, font=font, anchor="lm")
        picture = Image.fromarray(frame).resize((width, height), Image.Resampling.NEAREST)
        canvas.paste(picture, (left, line))
    for number, row in enumerate(rows):
        _draw_row(draw, row, font, size, (gap, line + height + gap + number * line + line // 2))
    return np.asarray(canvas)


def stack_vertically(strips: Sequence[np.ndarray]) -> np.ndarray:
    """Stack images (H, W, 3) vertically on white, aligned to the left."""
    width = max(strip.shape[1] for strip in strips)
    return np.concatenate(
        [np.pad(strip, ((0, 0), (0, width - strip.shape[1]), (0, 0)), constant_values=255) for strip in strips]
    )


def _draw_row(draw, row, font, size: int, start: tuple[int, int]) -> None:
    left, middle = start
    for name, colour in row:
        box = (left, middle - size // 2, left + size, middle + size // 2)
        draw.rectangle(box, fill=colour, outline=_EDGE)
        draw.text((left + 1.4 * size, middle), name, fill=_INK, font=font, anchor="lm")
        left += _entry_width(name, font, size)


def _legend_rows(legend, font, size: int, width: int) -> Sequence[Legend]:
    rows: list[list[tuple[str, Colour]]] = []
    for entry in legend:
        if rows and _row_width([*rows[-1], entry], font, size) <= width:
            rows[-1].append(entry)
        else:
            rows.append([entry])
    return rows


def _row_width(row, font, size: int) -> int:
    return sum(_entry_width(name, font, size) for name, _ in row) - size


def _entry_width(name: str, font, size: int) -> int:
    return round(2.4 * size) + _text_width(font, name)


def _text_width(font, text: str) -> int:
    return round(font.getlength(text)) + 1


def _enlargement(height: int, width: int) -> int:
    return max(1, math.ceil(_SMALLEST_PANEL / max(height, width)))


@lru_cache
def load_font(size: int) -> ImageFont.FreeTypeFont:
    """Return the font of captions and numbers in a size in pixels."""
    import matplotlib

    # matplotlib ships DejaVu Sans, so it is always available; it covers more than Latin letters
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    return ImageFont.truetype(str(path), size)
