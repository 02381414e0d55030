"""COCO's run lengths of masks in JSON: alternating counts of zeros and ones, column by column, see `RunLengths`.

In the compressed form, each count from the fourth on is stored as its difference to the count two before. Each number
is split into groups of five bits, the lowest first; a sixth bit marks that more follow. Each group is a letter, counted
from `0` (pycocotools' maskApi.c).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dinoseg.utils.wording import format_value

_MORE, _SIGN, _BITS, _FIRST = 32, 16, 31, 48
_DIGITS = 7  # letters per count: 35 bits, as differences of 32-bit counts need


def to_text(counts: np.ndarray) -> str:
    """Return counts in the compressed form."""
    rest = counts.astype(np.int64).copy()
    rest[3:] -= counts[1:-2]
    letters = np.zeros((len(rest), _DIGITS), np.uint8)  # 0: no letter
    going = np.ones(len(rest), bool)
    for digit in range(_DIGITS):
        low = rest & _BITS
        rest = rest >> 5
        more = np.where(low & _SIGN, rest != -1, rest != 0) & going
        letters[going, digit] = (low | np.where(more, _MORE, 0))[going] + _FIRST
        going = more
    return letters[letters > 0].tobytes().decode("ascii")


def from_text(text: str) -> np.ndarray:
    """Return the counts (N,) int64 of the compressed form.

    Raises:
        ValueError: the text is not in the compressed form.
    """
    try:
        codes = np.frombuffer(text.encode("ascii"), np.uint8).astype(np.int64) - _FIRST
    except UnicodeEncodeError:
        raise ValueError("its counts hold invalid characters") from None
    if codes.size and (codes.min() < 0 or codes.max() > 63):
        raise ValueError("its counts hold invalid characters")
    if not codes.size:
        return codes
    ends = np.flatnonzero(codes < _MORE)
    if not ends.size or ends[-1] != codes.size - 1:
        raise ValueError("its counts are truncated")
    if np.diff(ends, prepend=-1).max() > _DIGITS:
        raise ValueError("its counts hold a number that is too large")
    values = _join_letters(codes, ends)
    for first in (1, 2):  # each is stored as its difference to the count two before
        values[first::2] = np.cumsum(values[first::2])
    return values


def _join_letters(codes: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Return the numbers (N,) int64 of the codes (M,) of letters, from the places (N,) of their last letters."""
    digits = np.diff(ends, prepend=-1)
    starts = ends - digits + 1
    shifts = 5 * (np.arange(codes.size) - np.repeat(starts, digits))
    values = np.add.reduceat((codes & _BITS) << shifts, starts)
    return values - np.where(codes[ends] & _SIGN, np.int64(1) << (5 * digits), 0)


def parse_texts(texts: Sequence[str], pixels: int) -> list[np.ndarray] | None:
    """Return the counts (N,) int64 of several masks of `pixels` pixels at once, several times as fast as one by one.

    Returns:
        None if one of them is not in the compressed form of such a mask: `parse_counts` names the fault.
    """
    lengths = np.array([len(text) for text in texts], np.int64)
    whole = "".join(texts)
    if not whole.isascii() or not lengths.size or not 0 < lengths.min() <= lengths.max() <= _DIGITS * (pixels + 1):
        return None
    codes = np.frombuffer(whole.encode("ascii"), np.uint8).astype(np.int64) - _FIRST
    ends = np.flatnonzero(codes < _MORE)
    first = np.searchsorted(ends, np.cumsum(lengths) - lengths)  # number of each mask
    last = np.append(first[1:], len(ends)) - 1
    is_complete = (last >= first).all() and np.array_equal(ends[last], np.cumsum(lengths) - 1)
    if codes.min() < 0 or codes.max() >= 2 * _MORE or not is_complete:
        return None
    if np.diff(ends, prepend=-1).max() > _DIGITS:
        return None
    values = _join_letters(codes, ends)
    numbers = last - first + 1
    owners = np.repeat(np.arange(len(texts)), numbers)
    places = np.arange(len(values)) - np.repeat(first, numbers)
    for chain in (np.flatnonzero(places % 2), np.flatnonzero((places % 2 == 0) & (places > 0))):
        sums = np.cumsum(values[chain])
        # the sum before the first number of each mask is that of other masks
        heads = np.flatnonzero(np.diff(owners[chain], prepend=-1))
        before = sums[heads] - values[chain][heads]
        values[chain] = sums - np.repeat(before, np.diff(heads, append=len(chain)))
    totals = np.add.reduceat(values, first)
    if values.min() < 0 or values.max() > pixels or (totals != pixels).any():
        return None
    return np.split(values, first[1:])


def parse_mask(mask: Mapping[str, Any], size: tuple[int, int]) -> np.ndarray:
    """Return the counts (N,) int64 of a mask in JSON, which must have `size` (H, W).

    Raises:
        ValueError: it has another size, or its counts are invalid.
    """
    if mask.get("size") != list(size):
        raise ValueError(
            f"its mask has the size {format_value(mask.get('size'), 40)}, its image {list(size)} (height, width)"
        )
    return parse_counts(mask.get("counts"), size[0] * size[1])


def parse_counts(counts: Any, pixels: int) -> np.ndarray:
    """Return counts (N,) int64 of a mask of `pixels` pixels, given as numbers or in the compressed form.

    Raises:
        ValueError: they are not counts of such a mask.
    """
    if isinstance(counts, str):
        if len(counts) > _DIGITS * (pixels + 1):
            raise ValueError(f"its counts have {len(counts)} characters, more than a mask of {pixels} pixels needs")
        values = from_text(counts)
    elif isinstance(counts, Sequence) and all(type(count) is int and abs(count) <= pixels for count in counts):
        values = np.array(counts, np.int64)
    else:
        raise ValueError(f"its counts must be text or whole numbers from 0 to {pixels}")
    if values.size and not (values.min() >= 0 and values.max() <= pixels):
        raise ValueError(f"its counts go from {values.min()} to {values.max()}: each must be from 0 to {pixels}")
    if values.sum() != pixels:
        raise ValueError(f"its counts add up to {values.sum()} pixels; its mask has {pixels}")
    return values
