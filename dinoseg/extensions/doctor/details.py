"""What the doctor measures of images and masks to compare them: a perceptual hash, edges and borders."""

from base64 import b64decode, b64encode
from typing import Any

import cv2
import numpy as np

from dinoseg.data.scan.measure import Details
from dinoseg.utils.levels import to_display

SMALL = 64  # rows and columns of the small copies
_HASHED, _LOWEST = 32, 8  # the perceptual hash covers the 8 x 8 lowest frequencies of 32 x 32 pixels
_FLAT = 2.0  # grey-level standard deviation below which an image has no hash: it would be noise


def _measure_image(pixels: np.ndarray) -> dict[str, Any]:
    shown = to_display(pixels)
    return {"look": compute_perceptual_hash(shown), "edges": _encode(rank_edges(shown))}


def _measure_mask(mask: np.ndarray) -> dict[str, Any]:
    return {"borders": _encode(mark_borders(mask.max(axis=0) if mask.ndim > 2 else mask))}


# `look`: 64-bit perceptual hash, None of a flat image; `edges` and `borders`: bytes in base64
DETAILS = Details(_measure_image, _measure_mask)


def _encode(small: np.ndarray) -> str:
    return b64encode(small.tobytes()).decode()


def decode(text: str) -> np.ndarray:
    """Return the bytes (N,) uint8 of `edges` or `borders`."""
    return np.frombuffer(b64decode(text), dtype=np.uint8)


# imagehash's phash finds the same copies in 3.5 times the time, and hashes the noise of a flat image
def compute_perceptual_hash(pixels: np.ndarray) -> int | None:
    """Return 64 bits: which low frequencies of an image (H, W, 3) are above their median; None if it is flat."""
    grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    small = cv2.resize(grey, (_HASHED, _HASHED), interpolation=cv2.INTER_AREA).astype(np.float32)
    if small.std() < _FLAT:
        return None
    waves = cv2.dct(small)[:_LOWEST, :_LOWEST].ravel()
    bits = waves > np.median(waves[1:])  # the first is the mean level
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def rank_edges(pixels: np.ndarray) -> np.ndarray:
    """Return the gradient rank (64 * 64,) uint8 of each pixel in a small copy of an image (H, W, 3).

    Ranks are robust to differences in exposure and contrast.
    """
    small = cv2.resize(pixels, (SMALL, SMALL), interpolation=cv2.INTER_AREA).astype(np.float32)
    across, down = cv2.Sobel(small, cv2.CV_32F, 1, 0), cv2.Sobel(small, cv2.CV_32F, 0, 1)
    steepness = np.hypot(across, down).max(axis=-1).ravel()  # (64 * 64,)
    ordered = np.sort(steepness)
    rank = np.searchsorted(ordered, steepness, "left") + np.searchsorted(ordered, steepness, "right")
    return (rank * (255 / (2 * rank.size))).astype(np.uint8)


def mark_borders(ids: np.ndarray) -> np.ndarray:
    """Return bits (64 * 64 / 8,) uint8 that mark border pixels in a small copy of class ids (H, W)."""
    small = cv2.resize(ids, (SMALL, SMALL), interpolation=cv2.INTER_NEAREST_EXACT)
    on_border = np.zeros((SMALL, SMALL), dtype=bool)
    across, down = small[:, 1:] != small[:, :-1], small[1:] != small[:-1]
    on_border[:, 1:] |= across
    on_border[:, :-1] |= across
    on_border[1:] |= down
    on_border[:-1] |= down
    return np.packbits(on_border)
