"""A picture of a clip: some of its frames above what was found in them."""

from collections.abc import Sequence

import numpy as np

from dinoseg.core.sizes import evenly_spaced
from dinoseg.report.overlay import blend, reduced, side_by_side, stacked
from dinoseg.report.palette import default_palette

_SHOWN = 4  # frames


def clip_strip(
    frames: Sequence[np.ndarray],
    segments: Sequence[np.ndarray],
    references: Sequence[np.ndarray] | None = None,
    *,
    longest: int | None = None,
) -> np.ndarray:
    """Return up to four frames (H, W, 3) of a clip, spread evenly, above their segments and references (H, W).

    Ids are told apart by colour; id 0 stays as it is, and 255 (nothing is known) becomes beige. Frames with more than
    `longest` pixels on their longer side are reduced to so many.
    """
    shown = evenly_spaced(len(frames), _SHOWN)
    palette = default_palette(255)
    small = {number: reduced(frames[number], longest) for number in shown}
    rows = [[(f"frame {number}", frame) for number, frame in small.items()]]
    for caption, masks in (("segments", segments), ("reference", references)):
        if masks is not None:
            ids = [reduced(masks[number], longest) for number in shown]
            tinted = [blend(*pair, palette, opacity=0.6) for pair in zip(small.values(), ids, strict=True)]
            rows.append([(caption, picture) for picture in tinted])
    return stacked([side_by_side(row) for row in rows])
