"""Checks for masks that do not match their image: paired with a wrong one, resized, or with a rotated one."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from dinoseg.data.checks.files import format_sizes
from dinoseg.data.checks.findings import Finding, ScannedSplit
from dinoseg.data.scan.measure import Record
from dinoseg.extensions.doctor.details import SMALL, decode
from dinoseg.utils.images import IMAGE_SUFFIXES, is_turned
from dinoseg.utils.wording import count_of

_ROWS = 512  # images compared at once
_SPAN = 4096  # images further apart in name order are not compared
_GAIN = 0.45  # minimum gain of a swap, as a share of the median fit
_MIN_GAIN = 0.15
_MIN_FIT = 0.12  # below it, masks do not follow edges, and no swap can be detected
_GOOD_FIT = 0.3  # share of the median fit that both masks must reach on the other's image
_STEPS = (1, -1, 2, -2, 3, -3)  # shifts of the masks against the images that are tried
_CLEARLY, _MOSTLY, _FEWEST = 0.02, 0.4, 8


def check_pairing(part: ScannedSplit) -> Iterator[Finding]:
    """Yield findings about swapped masks, masks shifted against the images, and a mask shared by several images."""
    records = [record for record in part.records if {"edges", "borders"} <= record.details.keys()]
    if len(records) > 1:
        edges, borders = _unit_rows(records)
        shift = _shift(edges, borders)
        if shift:
            yield _report_shift(part, shift)
        else:
            yield from _report_swaps(part, records, edges, borders)
    yield from _report_shared_masks(part)


def swapped_pairs(edges: np.ndarray, borders: np.ndarray) -> list[tuple[int, int]]:
    """Return pairs (i, j), i < j, whose masks fit far better when swapped.

    Let s(i, j) be the correlation of image i's edges with mask j's borders, and m the median of s(i, i). A swap
    requires:

    - s(i, j) > s(i, i) and s(j, i) > s(j, j);
    - both s(i, j) and s(j, i) at least 0.3 m;
    - a gain in the sum of at least max(0.15, 0.45 m).

    If m < 0.12, no pair is returned.

    Args:
        edges: (N, P) float32, rows of mean 0 and length 1.
        borders: (N, P) float32, rows of mean 0 and length 1.
    """
    paired_fit = np.einsum("np,np->n", edges, borders)  # (N,)
    common = float(np.median(paired_fit))
    if common < _MIN_FIT:
        return []
    least = max(_MIN_GAIN, _GAIN * common)
    swaps = []
    for start in range(0, len(paired_fit), _ROWS):
        rows, columns = slice(start, start + _ROWS), slice(start, start + _ROWS + _SPAN)
        ahead, back = edges[rows] @ borders[columns].T, borders[rows] @ edges[columns].T
        mine, other = paired_fit[rows, None], paired_fit[None, columns]
        gain = ahead + back - mine - other
        is_candidate = (ahead > mine) & (back > other) & (np.minimum(ahead, back) >= _GOOD_FIT * common)
        for row, column in zip(*np.nonzero((gain >= least) & is_candidate), strict=True):
            if row < column:
                swaps.append((float(gain[row, column]), start + int(row), start + int(column)))
    taken: set[int] = set()
    pairs = []
    for _, one, two in sorted(swaps, reverse=True):
        if not {one, two} & taken:
            taken |= {one, two}
            pairs.append((one, two))
    return sorted(pairs)


def _unit_rows(records: Sequence[Record]) -> tuple[np.ndarray, np.ndarray]:
    edges = np.stack([decode(record.details["edges"]) for record in records])
    bits = np.stack([np.unpackbits(decode(record.details["borders"])) for record in records])
    return _unit(edges), _unit(bits)  # (N, 64 * 64) each


def _unit(rows: np.ndarray) -> np.ndarray:
    assert rows.shape[1] == SMALL * SMALL
    centred = rows - rows.mean(axis=1, dtype=np.float32, keepdims=True)
    length = np.sqrt(np.einsum("np,np->n", centred, centred))[:, None]
    return np.divide(centred, length, out=np.zeros_like(centred), where=length > 1e-3)


def _shift(edges: np.ndarray, borders: np.ndarray) -> int:
    """Return the shift of masks against images, in positions, that clearly improves the fit; 0 if there is none."""
    if len(edges) < _FEWEST:
        return 0
    paired_fit = np.einsum("np,np->n", edges, borders)
    for step in _STEPS:
        here = slice(max(0, -step), len(paired_fit) - max(0, step))
        there = slice(max(0, step), len(paired_fit) + min(0, step))
        fit = np.einsum("np,np->n", edges[here], borders[there])
        if np.mean(fit > paired_fit[here] + _CLEARLY) > _MOSTLY and np.median(fit) > np.median(paired_fit) + _CLEARLY:
            return step
    return 0


def _report_shift(part: ScannedSplit, shift: int) -> Finding:
    side = "later" if shift > 0 else "earlier"
    return Finding(
        "error",
        "masks_shifted",
        f"The masks of {part.split} fit the images better when shifted {count_of(abs(shift), 'place')} {side} in name "
        "order: images and masks are misaligned.",
        tuple(record.mask for record in part.records),
        "Pair them again by name, from the source. One missing file shifts all later pairs.",
        tuple((part.split, record.name) for record in part.records[:2]),
        stops=False,
    )


def _report_swaps(
    part: ScannedSplit, records: Sequence[Record], edges: np.ndarray, borders: np.ndarray
) -> Iterator[Finding]:
    pairs = swapped_pairs(edges, borders)
    if pairs:
        yield Finding(
            "warning",
            "swapped_pair",
            f"{count_of(pairs, 'pair')} of masks of {part.split} that fit much better when swapped: each follows the "
            "edges of the other's image.",
            tuple(f"{records[one].mask} <-> {records[two].mask}" for one, two in pairs),
            "Check them, and rename the two masks if they are swapped.",
            tuple((part.split, records[index].name) for pair in pairs for index in pair),
        )


def _report_shared_masks(part: ScannedSplit) -> Iterator[Finding]:
    """Yield a finding about multi-class masks that are paired with different images."""
    groups = defaultdict(list)
    for record in part.records:
        if record.mask_digest and len(record.pixels) > 1:
            groups[record.mask_digest].append(record)
    shared = [group for group in groups.values() if len({record.image_digest for record in group}) > 1]
    if shared:
        yield Finding(
            "warning",
            "one_mask_many_images",
            f"{sum(map(len, shared))} images of {part.split} with the same mask as another image, pixel for pixel.",
            tuple(" = ".join(record.mask for record in group) for group in shared),
            "Check them: a copied mask is wrong for all images but one.",
            tuple((part.split, record.name) for record in shared[0][:2]),
        )


def check_resized(splits: Sequence[ScannedSplit]) -> Iterator[Finding]:
    """Yield a finding of the masks that are resized to their images when they are read."""
    records = [record for part in splits for record in part.records]
    resized = [record for record in records if _has_other_size(record) and "size_mismatch" not in record.problems]
    if resized:
        yield Finding(
            "warning",
            "resized_masks",
            f"{len(resized)} of {len(records)} masks of another size (width x height) than their image. They are "
            "resized by nearest neighbour when they are read.",
            tuple(record.mask for record in resized),
            "Create them again from their source at the image's size; until then borders are as coarse as in the "
            "smaller masks.",
            reasons=tuple(map(format_sizes, resized)),
        )


def check_orientation(splits: Sequence[ScannedSplit]) -> Iterator[Finding]:
    """Yield a finding of the images that are rotated on reading while their masks are not."""
    turned = [(part, record) for part in splits for record in part.records if _is_turned(record.image)]
    if turned:
        total = sum(len(part.records) for part in splits)
        yield Finding(
            "warning",
            "turned_by_exif",
            f"{len(turned)} of {total} images with an EXIF orientation: they are rotated or mirrored when they are "
            "read, but their masks are not.",
            tuple(record.image for _, record in turned),
            "Compare images and masks. If a mask matches the stored pixels, remove the orientation from the image file "
            "(exiftool -Orientation= FILE); if it matches the image as viewers show it, nothing is wrong.",
            tuple((part.split, record.name) for part, record in turned[:4]),
        )


def _is_turned(image: str) -> bool:
    if Path(image).suffix.lower() not in IMAGE_SUFFIXES:  # a video frame has no file of its own
        return False
    try:
        return is_turned(image)
    except Exception:  # a decoder may raise anything on a damaged file, which other checks report
        return False


def _has_other_size(record: Record) -> bool:
    """Return whether image and mask have known and different sizes."""
    if record.image_size is None or record.mask_size is None:
        return False
    return tuple(record.image_size) != tuple(record.mask_size)
