"""Heat map of a confusion matrix, whose cells show their counts on hover or by the arrow keys."""

from collections.abc import Sequence

import numpy as np

from dinoseg.report.html.page import paragraph, text, values
from dinoseg.report.html.pictures import data_uri

MOST = 150  # maximum classes: those with the most pixels in the reference
_MOST_NUMBERS = 20  # classes up to which the cells carry numbers
_LONGEST_NAME = 24
_LEAST = 0.001  # minimum share with a number
_FULL = 0.3  # share above which the number is light
_BLUE = (31, 95, 191)
_EMPTY = (128, 128, 128, 40)  # a row without pixels


def heat_map(matrix: np.ndarray, classes: Sequence[str], name: str = "counts") -> str:
    """Return counts (K, K), rows = reference, as a map of each row's shares.

    It is an image with one pixel per cell, whose opacity grows with the share, so that it fits a light and a dark page.
    Without a script, the map is visible but does not show its counts.
    """
    order = np.arange(len(classes))
    note = ""
    if len(classes) > MOST:
        order = np.sort(np.argsort(-matrix.sum(axis=1), kind="stable")[:MOST])
        note = paragraph(f"The {MOST} of {len(classes)} classes with the most reference pixels; confusion.png has all.")
    counts, names = matrix[np.ix_(order, order)].astype(np.int64), [classes[index] for index in order.tolist()]
    totals = counts.sum(axis=1, keepdims=True)
    shares = counts / np.maximum(totals, 1)
    return (
        f"{note}<figure>{_drawing(counts, shares, names, name)}<output>Point at a cell, or use the arrow keys, to see "
        f"its counts.</output></figure>{values(name, {'names': names, 'counts': counts.tolist()})}"
    )


def _drawing(counts: np.ndarray, shares: np.ndarray, names: Sequence[str], name: str) -> str:
    size = len(names)
    cell = float(np.interp(size, (2, 10, 25, 150), (56, 40, 26, 12)))  # units of the drawing
    letters = min(max(map(len, names)), _LONGEST_NAME)
    margin = 16 + 6.6 * letters
    side = margin + cell * size
    pixels = np.zeros((size, size, 4), np.uint8)
    pixels[..., :3] = _BLUE
    # the root keeps rare confusions visible next to a diagonal of nearly 1
    pixels[..., 3] = np.round(255 * np.sqrt(shares))
    pixels[counts.sum(axis=1) == 0] = _EMPTY
    parts = [
        f'<g transform="translate({margin:.1f} {margin:.1f}) scale({cell:.3f})">'
        f'<image width="{size}" height="{size}" preserveAspectRatio="none" href="{data_uri(pixels)}"/>'
        f'<rect class="mark" width="1" height="1" visibility="hidden" style="stroke-width: {2 / cell:.3f}"/></g>'
    ]
    for index, title in enumerate(names):
        middle = margin + (index + 0.5) * cell
        short = title if len(title) <= _LONGEST_NAME else f"{title[: _LONGEST_NAME - 1]}…"
        parts.append(
            f'<text x="{margin - 6:.1f}" y="{middle + 4:.1f}" text-anchor="end">{text(short)}</text>'
            f'<text transform="translate({middle + 4:.1f} {margin - 6:.1f}) rotate(-90)">{text(short)}</text>'
        )
    if size <= _MOST_NUMBERS:
        parts += [
            _number(share, margin + (column + 0.5) * cell, margin + (row + 0.5) * cell + 3.5)
            for (row, column), share in np.ndenumerate(shares)
            if share >= _LEAST
        ]
    label = "confusion matrix: a row for each reference class, a column for each predicted one; opacity is the share"
    return (
        f'<svg class="heat" viewBox="0 0 {side + 4:.0f} {side + 4:.0f}" style="--wide: {side:.0f}px" tabindex="0" '
        f'role="img" aria-label="{label}" data-counts="{text(name)}">{"".join(parts)}</svg>'
    )


def _number(share: float, x: float, y: float) -> str:
    kind = "cell full" if share > _FULL else "cell"
    shown = "&lt;1" if share < 0.01 else f"{100 * share:.0f}"
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="middle">{shown}</text>'
