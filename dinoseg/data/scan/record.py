"""What is known of one image and its mask; imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np


@dataclass(frozen=True)
class Record:
    """One pair, measured.

    Args:
        name: of the pair.
        image: the image file, as text.
        mask: the mask file, as text.
        image_size: height and width, None where unknown.
        mask_size: height and width in the file, None where unknown.
        mask_format: what the mask file is by its content, such as PNG or JPEG.
        pixels: class id or ignore_index to pixels, as training sees the mask; empty for a refused one.
        raw: number or colour in the mask file to pixels; at most 256 of them.
        problems: code to reason, of all that would stop a run.
        passing: whether a problem may be the disk's or the memory's, and gone the next time.
        mask_digest: hash of the ids.
        decoded: whether the image was decoded; what follows is known only then.
        image_digest: hash of the pixels.
        look: 64-bit perceptual hash (DCT), None of a flat picture.
        color_sums: of red, green and blue levels 0..255 over all pixels.
        color_squares: of their squares.
        edges: (64 * 64,) uint8, rank of the colour gradient of a small copy.
        borders: (64 * 64 / 8,) uint8, bits: where a small copy of the mask has borders.
    """

    name: str
    image: str
    mask: str
    image_size: tuple[int, int] | None = None
    mask_size: tuple[int, int] | None = None
    mask_format: str = ""
    pixels: Mapping[int, int] = field(default_factory=dict)
    raw: Mapping[str, int] = field(default_factory=dict)
    problems: Mapping[str, str] = field(default_factory=dict)
    passing: bool = False
    mask_digest: str = ""
    decoded: bool = False
    image_digest: str = ""
    look: int | None = None
    color_sums: tuple[int, ...] = ()
    color_squares: tuple[int, ...] = ()
    edges: bytes = b""
    borders: bytes = b""

    @property
    def counts(self) -> np.ndarray:
        """Return pixels (256,) int64 of each class id, those of ignore_index too."""
        counts = np.zeros(256, dtype=np.int64)
        counts[list(self.pixels)] = list(self.pixels.values())
        return counts

    def with_problem(self, code: str, reason: str, *, passing: bool = False) -> "Record":
        """Return the record with one problem more."""
        return replace(self, problems={**self.problems, code: reason}, passing=self.passing or passing)
