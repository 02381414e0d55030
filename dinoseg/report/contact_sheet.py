"""Contact sheet: small images in rows, each with a caption."""

from collections.abc import Sequence

import numpy as np

from dinoseg.report.overlay import reduced, side_by_side, stacked

_SIDE = 320  # pixels of an image's longer side
_LONGEST = 22  # characters of a caption; longer captions show their end


def contact_sheet(pictures: Sequence[tuple[str, np.ndarray]], *, columns: int = 5) -> np.ndarray:
    """Lay out pairs of caption and image (H, W, 3), of any size, in rows from left to right."""
    small = [(_short(caption), reduced(picture, _SIDE)) for caption, picture in pictures]
    height, width = (max(picture.shape[axis] for _, picture in small) for axis in (0, 1))
    cells = [(caption, _centred(picture, height, width)) for caption, picture in small]
    cells += [("", np.full((height, width, 3), 255, np.uint8))] * (-len(cells) % min(columns, len(cells)))
    return stacked([side_by_side(cells[first : first + columns]) for first in range(0, len(cells), columns)])


def _short(caption: str) -> str:
    return caption if len(caption) <= _LONGEST else f"…{caption[1 - _LONGEST :]}"


def _centred(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    down, right = height - picture.shape[0], width - picture.shape[1]
    edges = ((down // 2, down - down // 2), (right // 2, right - right // 2), (0, 0))
    return np.pad(picture, edges, constant_values=255)
