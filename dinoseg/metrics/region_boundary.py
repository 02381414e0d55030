"""DAVIS's region similarity J, boundary measure F and statistics, for all pairs or for equal ids."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from math import isqrt

import cv2
import numpy as np

_WORD = np.dtype("<u8")  # 64 pixels of a row; the lowest bit is the leftmost
_BITS = 64
_COUNTED = 2**27  # bytes per OpenCV call, which sums their bits in a signed 32-bit integer
_AT_ONCE = 2**16  # bytes of masks per chunk: they stay in the processor's cache


@dataclass(frozen=True)
class BitRows:
    """Some rows of a bit mask: (h, words) from row `top` on, which may lie above the image; other rows are empty."""

    top: int
    words: np.ndarray

    def shared(self, other: "BitRows") -> int:
        """Return the number of pixels set in both."""
        top = max(self.top, other.top)
        bottom = min(self.top + len(self.words), other.top + len(other.words))
        if bottom <= top:
            return 0
        return _count(
            self.words[top - self.top : bottom - self.top] & other.words[top - other.top : bottom - other.top]
        )


@dataclass(frozen=True)
class Mask:
    """A mask, its boundary and the area within the tolerance of the boundary, with pixel counts of the first two."""

    inside: BitRows
    edge: BitRows
    near: BitRows
    size: int
    edge_size: int


class Frame:
    """Bit layout of the masks of frames of one size: all rows have the same number of words.

    Every row ends with at least `radius` empty pixels, so that shifts do not carry pixels into the next row.

    Args:
        size: (H, W).
        radius: inclusive distance in pixels within which a pixel is near a boundary.
    """

    def __init__(self, size: tuple[int, ...], radius: int) -> None:
        self.height, self.width = size
        self.radius = radius
        self.words = -(-(self.width + self.radius) // _BITS)
        plane = self.height * self.words * _WORD.itemsize
        self.at_once = max(_AT_ONCE // max(plane, 1), 1)
        self._has_right = _packed(np.arange(self.words * _BITS) < self.width - 1)

    def masks(self, maps: Sequence[tuple[np.ndarray, range]]) -> list[list[Mask]]:
        """Return the masks of the given labels of each map of ids (H, W)."""
        bits = np.concatenate([self._bits(ids, labels) for ids, labels in maps])
        steps = range(0, len(bits), self.at_once)
        masks = [mask for start in steps for mask in self._masks(bits[start : start + self.at_once])]
        ends = list(accumulate(len(labels) for _, labels in maps))
        return [masks[end - len(labels) : end] for end, (_, labels) in zip(ends, maps, strict=True)]

    def _bits(self, ids: np.ndarray, labels: range) -> np.ndarray:
        """Return the mask (n, H, words) of each label."""
        held = np.zeros((len(labels), self.height, self.words * _WORD.itemsize), dtype=np.uint8)
        rows = max(_AT_ONCE // max(self.width, 1), 1)
        for plane, label in zip(held, labels, strict=True):
            for top in range(0, self.height, rows):
                packed = np.packbits(ids[top : top + rows] == label, axis=1, bitorder="little")
                plane[top : top + rows, : packed.shape[1]] = packed
        return held.view(_WORD)

    def _masks(self, bits: np.ndarray) -> list[Mask]:
        """Describe each mask by its occupied rows and the row above them, which together hold the whole boundary.

        All masks are dilated in one column, one below the other, each with `radius` empty rows above and below.
        """
        edges = _edges(bits, self._has_right)
        spans = [_span(rows.tobytes()) for rows in np.asarray(bits.any(axis=2))]
        heights = [bottom - top + 2 * self.radius for top, bottom in spans]
        starts = list(accumulate(heights, initial=0))
        column = np.zeros((starts[-1], self.words), dtype=_WORD)
        for edge, (top, bottom), start in zip(edges, spans, starts, strict=False):
            column[start + self.radius :][: bottom - top] = edge[top:bottom]
        near = _widened(column, self.radius)
        return [
            Mask(
                BitRows(top, inside[top:bottom]),
                BitRows(top, edge[top:bottom]),
                BitRows(top - self.radius, near[start : start + height]),
                _count(inside[top:bottom]),
                _count(edge[top:bottom]),
            )
            for inside, edge, (top, bottom), start, height in zip(bits, edges, spans, starts, heights, strict=False)
        ]


def _packed(pixels: np.ndarray) -> np.ndarray:
    return np.packbits(pixels, bitorder="little").view(_WORD)


def _span(rows: bytes) -> tuple[int, int]:
    """Return the row above the first row with a pixel, and the end of the last such row; 0, 0 for an empty mask."""
    return max(rows.find(1) - 1, 0), rows.rfind(1) + 1


def _edges(bits: np.ndarray, has_right: np.ndarray) -> np.ndarray:
    """Return the pixels (n, H, words) that differ from their right, lower or lower-right neighbour in the image."""
    flat = bits.reshape(-1)
    right = flat >> 1
    right[:-1] |= flat[1:] << (_BITS - 1)
    right = right.reshape(bits.shape)
    edges = bits ^ right
    edges[:, :-1] |= bits[:, :-1] ^ right[:, 1:]
    edges &= has_right
    edges[:, :-1] |= bits[:, :-1] ^ bits[:, 1:]
    return edges


def _widened(bits: np.ndarray, radius: int) -> np.ndarray:
    """Return the union of disks around all pixels of (h, words), whose `radius` outermost rows are empty.

    Each row of a disk is a run of pixels: the runs grow from the ends of the disk to its middle.
    """
    runs, near, reach = bits.copy(), bits.copy(), 0
    for row in range(radius, -1, -1):
        half = isqrt(radius**2 - row**2)
        while reach < half:
            step = min(half - reach, 2 * reach + 1, _BITS - 1)  # a longer step would leave gaps
            _grow(runs.reshape(-1), step)
            reach += step
        near[row:] |= runs[: len(runs) - row]
        near[: len(runs) - row] |= runs[row:]
    return near


def _grow(flat: np.ndarray, step: int) -> None:
    """Add to every pixel of a flat image its neighbours `step` pixels to the left and right, at most 63."""
    ahead, behind = flat << step, flat >> step
    ahead[1:] |= flat[:-1] >> (_BITS - step)
    behind[:-1] |= flat[1:] << (_BITS - step)
    flat |= ahead
    flat |= behind


def _count(words: np.ndarray) -> int:
    """Return the number of set bits."""
    flat = words.reshape(-1).view(np.uint8)
    return sum(
        int(cv2.norm(flat[start : start + _COUNTED], cv2.NORM_HAMMING)) for start in range(0, len(flat), _COUNTED)
    )


TOLERANCE = 0.008  # share of the image diagonal within which boundaries match


def pair_scores(
    reference: np.ndarray,
    prediction: np.ndarray,
    num_objects: int,
    num_proposals: int,
    void: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return J and F, each (P, G) float64, of every proposal with every object of one frame.

    Each mask's boundary is found and dilated once, on bits, so the cost hardly depends on the content of the masks.

    Args:
        reference: object ids (H, W) of any integer type: 1..G, anything else is background.
        prediction: proposal ids (H, W): 1..P, anything else is background.
        num_objects: G, at most 255.
        num_proposals: P, at most 255.
        void: (H, W) bool, True where a pixel is background in both.

    Raises:
        ValueError: the maps differ in size, or there are more than 255 masks.
    """
    _check_frame(reference, prediction, max(num_objects, num_proposals))
    maps = [(reference, num_objects), (prediction, num_proposals)]
    known = [(_known(ids, count, void), range(1, count + 1)) for ids, count in maps]
    objects, proposals = _frame(reference.shape).masks(known)
    scores = [_score(proposal, one) for proposal in proposals for one in objects]
    region, boundary = np.array(scores, dtype=np.float64).reshape(num_proposals, num_objects, 2).transpose(2, 0, 1)
    return region, boundary


def object_scores(
    reference: np.ndarray, prediction: np.ndarray, num_objects: int, void: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return J and F, each (G,) float64, of every object with the proposal of the same id.

    This is the diagonal of `pair_scores`, without the cost of the other pairs.

    Args:
        reference: object ids (H, W) of any integer type: 1..G, anything else is background.
        prediction: proposal ids (H, W), in the same form.
        num_objects: G, at most 255.
        void: (H, W) bool, True where a pixel is background in both.

    Raises:
        ValueError: the maps differ in size, or there are more than 255 masks.
    """
    _check_frame(reference, prediction, num_objects)
    frame = _frame(reference.shape)
    maps = [_known(ids, num_objects, void) for ids in (reference, prediction)]
    scores = []
    for start in range(1, num_objects + 1, frame.at_once):
        labels = range(start, min(start + frame.at_once, num_objects + 1))
        pairs = zip(*frame.masks([(ids, labels) for ids in maps]), strict=True)
        scores += [_score(proposal, one) for one, proposal in pairs]
    region, boundary = np.array(scores, dtype=np.float64).reshape(num_objects, 2).T
    return region, boundary


def boundary_radius(size: tuple[int, ...]) -> int:
    """Return the inclusive distance in pixels within which boundaries of an (H, W) image match."""
    return int(np.ceil(TOLERANCE * np.linalg.norm(size)))


def statistics(values: np.ndarray) -> np.ndarray:
    """Return mean, recall and decay (..., 3) of scores per frame (..., T); nan without frames.

    Recall is the share of frames above 0.5. Decay is the mean of the first quarter of the frames minus that of the
    last; the last frame of a quarter is also the first of the next. A nan frame enters no mean and counts as not
    recalled.
    """
    length = values.shape[-1]
    if length == 0:
        return np.full((*values.shape[:-1], 3), np.nan)
    limits = (np.round(np.linspace(1, length, 5) + 1e-10) - 1).astype(np.int64)
    first, last = values[..., : limits[1] + 1], values[..., limits[3] :]
    recall = (values > 0.5).mean(axis=-1)
    return np.stack([_mean(values), recall, _mean(first) - _mean(last)], axis=-1)


def match_proposals(region: np.ndarray, boundary: np.ndarray) -> np.ndarray:
    """Return the proposal (G,) of each object, matched one to one to maximise the sum of the means of J and F.

    Args:
        region: J (P, G, T) per frame, with P at least G and T at least 1.
        boundary: F (P, G, T).
    """
    from scipy.optimize import linear_sum_assignment  # lazy: two thirds of a worker's imports, unused without matching

    quality = (region.mean(axis=2) + boundary.mean(axis=2)) / 2
    proposals, objects = linear_sum_assignment(quality, maximize=True)
    return proposals[np.argsort(objects)]


def _mean(values: np.ndarray) -> np.ndarray:
    defined = ~np.isnan(values)
    count = defined.sum(axis=-1)
    total = np.where(defined, values, 0.0).sum(axis=-1)
    return np.divide(total, count, out=np.full(count.shape, np.nan), where=count > 0)


def _check_frame(reference: np.ndarray, prediction: np.ndarray, count: int) -> None:
    if reference.shape != prediction.shape or reference.ndim != 2:
        raise ValueError(
            f"The reference is {reference.shape} and the prediction {prediction.shape}; both must be (H, W)."
        )
    if count > 255:
        raise ValueError(f"A frame has {count} masks; the limit is 255.")


@lru_cache(maxsize=8)
def _frame(size: tuple[int, ...]) -> Frame:
    return Frame(size, boundary_radius(size))


def _known(ids: np.ndarray, count: int, void: np.ndarray | None) -> np.ndarray:
    """Return ids (H, W) uint8, with 1..count unchanged and 0 where void."""
    if ids.dtype != np.uint8:
        ids = np.where((ids > 0) & (ids <= count), ids, 0).astype(np.uint8)
    return ids if void is None else np.where(void.astype(bool), 0, ids)


def _score(proposal: Mask, one: Mask) -> tuple[float, float]:
    """Return J and F of two masks."""
    both = proposal.inside.shared(one.inside)
    union = proposal.size + one.size - both
    region = both / union if union else 1.0
    if not proposal.edge_size or not one.edge_size:
        return region, float(proposal.edge_size == one.edge_size)
    precision = proposal.edge.shared(one.near) / proposal.edge_size
    recall = one.edge.shared(proposal.near) / one.edge_size
    total = precision + recall
    return region, 2 * precision * recall / total if total else 0.0
