"""A picture of a clip: some of its frames above what was found in them."""

from collections.abc import Sequence

import numpy as np

from dinoseg.report.overlay import blend, side_by_side
from dinoseg.report.palette import default_palette

_SHOWN = 4  # frames


def clip_strip(
    frames: Sequence[np.ndarray], segments: Sequence[np.ndarray], references: Sequence[np.ndarray] | None = None
) -> np.ndarray:
    """Return up to four frames (H, W, 3) of a clip, spread evenly, above their segments and references (H, W).

    Ids are told apart by colour; id 0 stays as it is, and 255 (nothing is known) becomes beige.
    """
    shown = sorted({round(place) for place in np.linspace(0, len(frames) - 1, _SHOWN)})
    palette = default_palette(255)
    rows = [[(f"frame {number}", frames[number]) for number in shown]]
    for caption, masks in (("segments", segments), ("reference", references)):
        if masks is not None:
            tinted = [blend(frames[number], masks[number], palette, opacity=0.6) for number in shown]
            rows.append([(caption, picture) for picture in tinted])
    strips = [side_by_side(row) for row in rows]
    width = max(strip.shape[1] for strip in strips)
    padded = [np.pad(strip, ((0, 0), (0, width - strip.shape[1]), (0, 0)), constant_values=255) for strip in strips]
    return np.concatenate(padded)
