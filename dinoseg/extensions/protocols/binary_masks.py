"""Masks of 0 and 255, or of 0 and 1, as class ids; no torch."""

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from dinoseg.extensions.protocols.trees import refuse_ids
from dinoseg.utils.errors import UserError


def are_binary(references: Iterable[Path], read: Callable[[Path], np.ndarray]) -> bool:
    """Return whether references hold 0 and 255 only; the search ends at the first file with other ids."""
    seen: set[int] = set()
    for path in references:
        try:
            seen |= set(np.unique(read(path)).tolist())
        except UserError:
            continue  # reported by `measure`
        if not seen <= {0, 255}:
            return False
    return len(seen) == 2


def from_binary(numbers: np.ndarray, path: Path | None) -> np.ndarray:
    """Return a mask of 0 and 255, or of 0 and 1, as class ids (H, W).

    Raises:
        BadFile: the mask has other values.
    """
    assert path is not None
    high = 255 if (numbers == 255).any() else 1
    refuse_ids(numbers, (numbers != 0) & (numbers != high), path, f"A binary mask holds only 0 and {high}.")
    return (numbers == high).astype(np.uint8)
