"""Measurements of one image and its mask; imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np


@dataclass(frozen=True)
class Record:
    """Measurements of one pair.

    Args:
        name: name of the pair.
        image: path of the image file, as text.
        mask: path of the mask file, as text.
        image_size: height and width, None if unknown.
        mask_size: height and width in the file, None if unknown.
        mask_format: format of the mask file by its content, such as PNG or JPEG.
        pixels: class id or ignore_index to number of pixels, as used in training; empty for a rejected mask.
        raw: number or colour in the mask file to number of pixels; at most 256 entries.
        problems: code to reason, of all problems that would stop a run.
        mask_digest: hash of the ids.
        decoded: whether the image was decoded; the fields below need it.
        image_digest: hash of the pixels.
        look: 64-bit perceptual hash (DCT), None for a flat image.
        edges: (64 * 64,) uint8, rank of the colour gradient of a small copy.
        borders: (64 * 64 / 8,) uint8, bits that mark borders in a small copy of the mask.
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
    mask_digest: str = ""
    decoded: bool = False
    image_digest: str = ""
    look: int | None = None
    edges: bytes = b""
    borders: bytes = b""

    @property
    def counts(self) -> np.ndarray:
        """Number of pixels (256,) int64 of each class id, including ignore_index."""
        counts = np.zeros(256, dtype=np.int64)
        counts[list(self.pixels)] = list(self.pixels.values())
        return counts

    def with_problem(self, code: str, reason: str) -> "Record":
        """Return a copy of the record with one more problem."""
        return replace(self, problems={**self.problems, code: reason})
