"""DAVIS's region similarity J, boundary measure F and statistics, for all pairs of objects of a frame at once."""

from dataclasses import dataclass
from math import isqrt

import numpy as np
from scipy.optimize import linear_sum_assignment

TOLERANCE = 0.008  # share of the image's diagonal within which boundaries match
_CHUNK = 65536  # pixels counted at once: bounds memory, and float32 counts them exactly


def pair_scores(
    reference: np.ndarray,
    prediction: np.ndarray,
    num_objects: int,
    num_proposals: int,
    void: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return J and F, each (P, G) float64, of every proposal with every object of one frame.

    J comes from one joint histogram of the two id maps. For F eight masks share a byte, one bit each, so
    that bitwise operations widen their boundaries together; all within the box that holds every mask.

    Args:
        reference: object ids (H, W) of any integer type: 1..G, anything else is background.
        prediction: proposal ids (H, W): 1..P, anything else is background.
        num_objects: G, at most 255.
        num_proposals: P, at most 255.
        void: True (H, W) where a pixel is background in both.

    Raises:
        ValueError: the maps differ in size, or more than 255 masks.
    """
    if reference.shape != prediction.shape or reference.ndim != 2:
        raise ValueError(f"The reference is {reference.shape} and the prediction {prediction.shape}; both are (H, W).")
    if max(num_objects, num_proposals) > 255:
        raise ValueError(f"At most 255 masks in a frame, and there are {max(num_objects, num_proposals)}.")
    objects, proposals = _crop(_known(reference, num_objects, void), _known(prediction, num_proposals, void))
    region = _region(objects, proposals, num_objects, num_proposals)
    radius = boundary_radius(reference.shape)
    return region, _boundary(_edges(objects, num_objects), _edges(proposals, num_proposals), objects.shape, radius)


def boundary_radius(size: tuple[int, ...]) -> int:
    """Return the distance in pixels, itself included, within which boundaries of an (H, W) image match."""
    return int(np.ceil(TOLERANCE * np.linalg.norm(size)))


def statistics(values: np.ndarray) -> np.ndarray:
    """Return mean, recall and decay (..., 3) of scores per frame (..., T); nan without a frame.

    Recall is the share of frames above 0.5. Decay is the mean of the first quarter of the frames less that
    of the last, where a quarter's last frame is also the next one's first. A frame of nan is in no mean and
    not recalled.
    """
    length = values.shape[-1]
    if length == 0:
        return np.full((*values.shape[:-1], 3), np.nan)
    limits = (np.round(np.linspace(1, length, 5) + 1e-10) - 1).astype(np.int64)
    first, last = values[..., : limits[1] + 1], values[..., limits[3] :]
    recall = (values > 0.5).mean(axis=-1)
    return np.stack([_mean(values), recall, _mean(first) - _mean(last)], axis=-1)


def match_proposals(region: np.ndarray, boundary: np.ndarray) -> np.ndarray:
    """Return the proposal (G,) of each object that makes the sum of the means of J and F greatest, one to one.

    Args:
        region: J (P, G, T) per frame, with P at least G and T at least 1.
        boundary: F (P, G, T).
    """
    quality = (region.mean(axis=2) + boundary.mean(axis=2)) / 2
    proposals, objects = linear_sum_assignment(quality, maximize=True)
    return proposals[np.argsort(objects)]


def _mean(values: np.ndarray) -> np.ndarray:
    defined = ~np.isnan(values)
    count = defined.sum(axis=-1)
    total = np.where(defined, values, 0.0).sum(axis=-1)
    return np.divide(total, count, out=np.full(count.shape, np.nan), where=count > 0)


def _known(ids: np.ndarray, count: int, void: np.ndarray | None) -> np.ndarray:
    """Return ids 1..count as uint8, 0 elsewhere."""
    if ids.dtype != np.uint8 or ids.max(initial=0) > count:
        ids = (ids * ((ids > 0) & (ids <= count))).astype(np.uint8)
    return ids if void is None else ids * ~void


def _crop(reference: np.ndarray, prediction: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return both maps within the box of their masks and one more pixel, which keeps every boundary."""
    either = reference | prediction
    rows = np.flatnonzero(np.bitwise_or.reduce(either, axis=1))
    if not len(rows):
        return reference[:0, :0], prediction[:0, :0]
    top, bottom = max(rows[0] - 1, 0), rows[-1] + 2
    columns = np.flatnonzero(np.bitwise_or.reduce(either[top:bottom], axis=0))
    box = slice(top, bottom), slice(max(columns[0] - 1, 0), columns[-1] + 2)
    return reference[box], prediction[box]


def _region(reference: np.ndarray, prediction: np.ndarray, num_objects: int, num_proposals: int) -> np.ndarray:
    columns = num_objects + 1
    seen = (reference | prediction) != 0
    joint = prediction[seen].astype(np.int64) * columns + reference[seen]
    table = np.bincount(joint, minlength=columns * (num_proposals + 1)).reshape(-1, columns)
    both = table[1:, 1:]  # (P, G)
    union = table.sum(axis=1)[1:, None] + table.sum(axis=0)[None, 1:] - both
    return np.divide(both, union, out=np.ones(both.shape), where=union > 0)


@dataclass(frozen=True)
class _Edges:
    """The boundary pixels of a map's masks: pixel i is one of mask 8 a + b + 1 where bit b of bits[a, i] is set."""

    count: int  # masks
    rows: np.ndarray  # (n,)
    columns: np.ndarray  # (n,)
    bits: np.ndarray  # (ceil(count / 8), n) uint8


def _edges(ids: np.ndarray, count: int) -> _Edges:
    """Find the pixels that differ from their right, lower or lower-right neighbour in the image."""
    differs = np.zeros(ids.shape, dtype=bool)
    differs[:, :-1] = ids[:, :-1] != ids[:, 1:]
    differs[:-1] |= ids[:-1] != ids[1:]
    differs[:-1, :-1] |= ids[:-1, :-1] != ids[1:, 1:]
    rows, columns = np.nonzero(differs)
    below, right = np.minimum(rows + 1, ids.shape[0] - 1), np.minimum(columns + 1, ids.shape[1] - 1)
    corners = np.stack([ids[rows, columns], ids[rows, right], ids[below, columns], ids[below, right]])
    masks = np.arange(count)
    flags = np.zeros((-(-count // 8), 256), dtype=np.uint8)
    flags[masks // 8, masks + 1] = 1 << masks % 8
    held = flags[:, corners]  # (planes, 4, n)
    # in some corner but not in all four: one of the three neighbours differs from the pixel itself
    bits = np.bitwise_or.reduce(held, axis=1) ^ np.bitwise_and.reduce(held, axis=1)
    return _Edges(count, rows, columns, bits)


def _boundary(objects: _Edges, proposals: _Edges, size: tuple[int, int], radius: int) -> np.ndarray:
    near_objects = _counts(proposals.bits, _near(objects, proposals, size, radius))
    near_proposals = _counts(objects.bits, _near(proposals, objects, size, radius)).T
    pairs = slice(proposals.count), slice(objects.count)
    object_sizes, proposal_sizes = _sizes(objects), _sizes(proposals)[:, None]
    empty = np.zeros((proposals.count, objects.count))
    precision = np.divide(near_objects[pairs], proposal_sizes, out=empty.copy(), where=proposal_sizes > 0)
    recall = np.divide(near_proposals[pairs], object_sizes, out=empty.copy(), where=object_sizes > 0)
    both = precision + recall
    score = np.divide(2 * precision * recall, both, out=empty, where=both > 0)
    return np.where((proposal_sizes == 0) & (object_sizes == 0), 1.0, score)


def _near(edges: _Edges, at: _Edges, size: tuple[int, int], radius: int) -> np.ndarray:
    """Return which masks have an edge within `radius` of each pixel of `at`: bits (planes, n).

    The rows lie end to end with `radius` empty pixels between, so that every shift is one run through memory.
    """
    width = size[1] + radius
    found = np.empty((len(edges.bits), len(at.rows)), dtype=np.uint8)
    for plane, bits in enumerate(edges.bits):
        flat = np.zeros(size[0] * width, dtype=np.uint8)
        flat[edges.rows * width + edges.columns] = bits
        found[plane] = _widen(flat, width, radius)[at.rows * width + at.columns]
    return found


def _widen(flat: np.ndarray, width: int, radius: int) -> np.ndarray:
    """Return the union of a flat image's pixels over a disk, from its narrowest rows to its widest."""
    wide, disk, reach = flat.copy(), flat.copy(), 0
    for row in range(radius, -1, -1):
        while reach < isqrt(radius**2 - row**2):
            reach += 1
            wide[reach:] |= flat[:-reach]
            wide[:-reach] |= flat[reach:]
        shift = row * width
        disk[shift:] |= wide[: max(len(wide) - shift, 0)]
        disk[: max(len(wide) - shift, 0)] |= wide[shift:]
    return disk


def _counts(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return the pixels that each pair of masks shares, (8 A, 8 B), from bits (A, n) and (B, n)."""
    total = np.zeros((8 * len(left), 8 * len(right)))
    for start in range(0, left.shape[1], _CHUNK):
        chunk = slice(start, start + _CHUNK)
        total += _unpack(left[:, chunk]) @ _unpack(right[:, chunk]).T
    return total


def _sizes(edges: _Edges) -> np.ndarray:
    everywhere = np.full((1, len(edges.rows)), 255, dtype=np.uint8)
    return _counts(edges.bits, everywhere)[: edges.count, 0]


def _unpack(bits: np.ndarray) -> np.ndarray:
    """Return bits (A, n) as one row of 0 and 1 for each mask, (8 A, n) float32."""
    single = np.unpackbits(bits[:, None], axis=1, bitorder="little")
    return single.reshape(8 * bits.shape[0], bits.shape[1]).astype(np.float32)
