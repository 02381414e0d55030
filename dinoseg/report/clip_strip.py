"""Figure of a clip: some of its frames above their predicted segments."""

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
    """Return up to four frames (H, W, 3) of a clip, evenly spaced, above their segments and references (H, W).

    Each id has its own colour; id 0 leaves the frame unchanged, and 255 (unknown) becomes beige. Frames with more than
    `longest` pixels on their longer side are downscaled to `longest`.
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
