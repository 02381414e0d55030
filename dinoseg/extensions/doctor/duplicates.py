"""Checks for equal and nearly equal images, by pixel hash and perceptual hash."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from dinoseg.data.checks.errors import same_files
from dinoseg.data.checks.findings import Finding, ScannedSplit
from dinoseg.data.scan.measure import Record
from dinoseg.utils.wording import count_of

_ROWS = 64  # hashes compared with all others at once
_MAX = 1000  # most pairs that are stored and listed
# numpy counts bits itself from 2.0 on; imagehash and imagededup compare pairs in Python, tens of times slower
_BITS = np.array([bin(value).count("1") for value in range(1 << 16)], dtype=np.uint8)


def check_duplicates(splits: Sequence[ScannedSplit], distance: int) -> Iterator[Finding]:
    """Yield findings about equal and nearly equal images across splits, and equal ones within a split.

    Args:
        splits: the splits to compare.
        distance: maximum number of differing bits, of 64, for two images to be nearly equal.
    """
    for first, second in combinations(splits, 2):
        yield from _across(first, second, distance)
    for part in splits:
        yield from _report_repeats(part)
        yield from _contradictory(part)


@dataclass
class Near:
    """Pairs of 64-bit hashes that differ in few bits: the closest, and the number of second hashes in any pair.

    All frames of a static camera are alike, so pairs are counted as they are found and only the closest are stored.

    Args:
        closest: at most 1000 (i, j, differing bits), closest first.
        second: number of distinct j in a pair.
    """

    closest: list[tuple[int, int, int]]
    second: int


def near_pairs(first: np.ndarray, second: np.ndarray, distance: int, *, same: tuple[np.ndarray, np.ndarray]) -> Near:
    """Return the pairs that differ in at most `distance` bits.

    Args:
        first: (N,) uint64.
        second: (M,) uint64.
        distance: 0 to 64.
        same: ids (N,) and (M,) of the images' content; pairs of equal ids are left out.
    """
    is_near = np.zeros(len(second), dtype=bool)
    nearest = np.empty((0, 3), dtype=np.int64)
    for start in range(0, len(first), _ROWS):
        here = slice(start, start + _ROWS)
        differing = first[here, None] ^ second[None]  # (rows, M)
        bits = _BITS[differing.view(np.uint16).reshape(*differing.shape, 4)].sum(axis=-1, dtype=np.uint8)
        near = (bits <= distance) & (same[0][here, None] != same[1][None])
        is_near |= near.any(axis=0)
        flat = np.flatnonzero(near)
        flat = flat[np.argsort(bits.ravel()[flat], kind="stable")[:_MAX]]
        rows, columns = np.divmod(flat, max(1, len(second)))
        nearest = np.concatenate([nearest, np.stack([rows + start, columns, bits[rows, columns]], axis=1)])
        nearest = nearest[np.argsort(nearest[:, 2], kind="stable")[:_MAX]]
    closest = [(one, two, count) for one, two, count in nearest.tolist()]
    return Near(closest, int(is_near.sum()))


def _across(first: ScannedSplit, second: ScannedSplit, distance: int) -> Iterator[Finding]:
    ours, theirs = _by_digest(first), _by_digest(second)
    reported = {two.name for _, two in same_files(first, second)}
    same = [(ours[key][0], two) for key in theirs if key in ours for two in theirs[key] if two.name not in reported]
    if same:
        yield Finding(
            "error",
            "duplicate_across_splits",
            f"{count_of(same, 'image')} of {second.split} also in {first.split}, pixel for pixel.",
            tuple(sorted(f"{one.image} = {two.image}" for one, two in same)),
            f"Remove them from {first.split}: scores of training images are meaningless.",
            ((first.split, same[0][0].name), (second.split, same[0][1].name)),
            stops=False,
        )
    near, pairs = _near(first, second, distance)
    if pairs:
        yield Finding(
            "warning",
            "near_duplicate_across_splits",
            f"{count_of(near.second, 'image')} of {second.split} nearly the same as one of {first.split} (at most "
            f"{distance} of 64 bits of the perceptual hash differ).",
            tuple(f"{one.image} ~ {two.image} ({bits} bits)" for one, two, bits in pairs),
            "Check the pairs: frames of one scene belong into one split (data.group).",
            tuple(key for one, two, _ in pairs[:2] for key in ((first.split, one.name), (second.split, two.name))),
        )


def _report_repeats(part: ScannedSplit) -> Iterator[Finding]:
    twice = {key: records for key, records in _by_digest(part).items() if len(records) > 1}
    if twice:
        repeated = sum(len(records) - 1 for records in twice.values())
        yield Finding(
            "note",
            "duplicate_in_split",
            f"{count_of(repeated, 'image')} of {part.split} equal to another one, pixel for pixel.",
            tuple(" = ".join(record.image for record in records) for records in twice.values()),
            "Keep one of each: repeated images count several times in training and in scores.",
        )


def _contradictory(part: ScannedSplit) -> Iterator[Finding]:
    """Yield findings about equal images whose masks differ."""
    for_image = [records for records in _by_digest(part).values() if len({r.mask_digest for r in records}) > 1]
    if for_image:
        yield Finding(
            "warning",
            "one_image_two_masks",
            f"{count_of(for_image, 'image')} of {part.split} stored several times, with different masks.",
            tuple(" or ".join(record.mask for record in records) for records in for_image),
            "Keep the correct mask of each.",
        )


def _near(first: ScannedSplit, second: ScannedSplit, distance: int) -> tuple[Near, list[tuple[Record, Record, int]]]:
    ours, theirs = ([r for r in part.records if r.details.get("look") is not None] for part in (first, second))
    hashes = [np.array([record.details["look"] for record in records], dtype=np.uint64) for records in (ours, theirs)]
    number: dict[str, int] = {}
    same = [
        np.array([number.setdefault(r.image_digest, len(number)) for r in records], dtype=np.int64)
        for records in (ours, theirs)
    ]
    near = near_pairs(hashes[0], hashes[1], distance, same=(same[0], same[1]))
    return near, [(ours[one], theirs[two], bits) for one, two, bits in near.closest]


def _by_digest(part: ScannedSplit) -> dict[str, list[Record]]:
    by_digest = defaultdict(list)
    for record in part.records:
        if record.image_digest:
            by_digest[record.image_digest].append(record)
    return by_digest
