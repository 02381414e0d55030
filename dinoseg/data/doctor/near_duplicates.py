"""Images that are the same, or nearly: by a hash of the pixels, and by a perceptual hash."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import combinations

import numpy as np

from dinoseg.data.doctor.findings import Finding, Scanned
from dinoseg.data.scan_record import Record

_ROWS = 256  # hashes compared with all others at once
_MOST = 1000  # pairs that are listed
_BITS = np.array([bin(value).count("1") for value in range(1 << 16)], dtype=np.uint8)


def check_duplicates(splits: Sequence[Scanned], distance: int) -> Iterator[Finding]:
    """Yield equal and nearly equal images, across splits and inside them.

    Args:
        splits: what is compared.
        distance: differing bits of 64 up to which two images are nearly equal.
    """
    for first, second in combinations(splits, 2):
        yield from _across(first, second, distance)
    for part in splits:
        yield from _inside(part, distance)
        yield from _contradictory(part)


def near_pairs(first: np.ndarray, second: np.ndarray, distance: int) -> Iterator[tuple[int, int, int]]:
    """Yield (i, j, differing bits) of 64-bit hashes that differ in at most `distance` bits."""
    for start in range(0, len(first), _ROWS):
        differing = first[start : start + _ROWS, None] ^ second[None]  # (rows, M)
        bits = _BITS[differing.view(np.uint16).reshape(*differing.shape, 4)].sum(axis=-1, dtype=np.uint8)
        for row, column in zip(*np.nonzero(bits <= distance), strict=True):
            yield start + int(row), int(column), int(bits[row, column])


def _across(first: Scanned, second: Scanned, distance: int) -> Iterator[Finding]:
    ours, theirs = _by_digest(first), _by_digest(second)
    same = [(one, two) for key in ours.keys() & theirs.keys() for one in ours[key] for two in theirs[key]]
    if same:
        yield Finding(
            "error",
            "duplicate_across_splits",
            f"{len(same)} images of {second.split} are in {first.split} too, pixel for pixel.",
            tuple(sorted(f"{one.image} = {two.image}" for one, two in same)),
            f"Remove them from {first.split}: what was trained on cannot be scored.",
            ((first.split, same[0][0].name), (second.split, same[0][1].name)),
        )
    near = [
        (one, two, bits)
        for one, two, bits in _near(first, second, distance)
        if not one.image_digest == two.image_digest != ""
    ]
    if near:
        yield Finding(
            "warning",
            "near_duplicate_across_splits",
            f"{len({two.name for _, two, _ in near})} images of {second.split} look like one of {first.split} (at most "
            f"{distance} of 64 bits of the perceptual hash differ).",
            _listing(near),
            "Look at the pairs: frames of one scene belong on one side of the split (data.group).",
            tuple(key for one, two, _ in near[:2] for key in ((first.split, one.name), (second.split, two.name))),
        )


def _inside(part: Scanned, distance: int) -> Iterator[Finding]:
    twice = {key: records for key, records in _by_digest(part).items() if len(records) > 1}
    if twice:
        yield Finding(
            "note",
            "duplicate_in_split",
            f"{sum(len(records) - 1 for records in twice.values())} images of {part.split} repeat another one, pixel "
            "for pixel.",
            tuple(" = ".join(record.image for record in records) for records in twice.values()),
            "Keep one of each: repeated images weigh more in training and in the score.",
        )
    near = [
        (one, two, bits)
        for one, two, bits in _near(part, part, distance)
        if one.name < two.name and one.image_digest != two.image_digest
    ]
    if near:
        yield Finding(
            "note",
            "near_duplicate_in_split",
            f"{len({record.name for pair in near for record in pair[:2]})} images of {part.split} look like another "
            f"one of {part.split}.",
            _listing(near),
            "Nothing to do for a video; elsewhere fewer of them would teach as much.",
        )


def _contradictory(part: Scanned) -> Iterator[Finding]:
    """Yield equal images whose masks differ."""
    for_image = [records for records in _by_digest(part).values() if len({r.mask_digest for r in records}) > 1]
    if for_image:
        yield Finding(
            "warning",
            "one_image_two_masks",
            f"{len(for_image)} images of {part.split} are there several times with masks that differ.",
            tuple(" ? ".join(record.mask for record in records) for records in for_image),
            "Keep the right mask of each.",
        )


def _near(first: Scanned, second: Scanned, distance: int) -> Iterator[tuple[Record, Record, int]]:
    ours, theirs = ([r for r in part.records if r.look is not None] for part in (first, second))
    looks = [np.array([record.look for record in records], dtype=np.uint64) for records in (ours, theirs)]
    for one, two, bits in near_pairs(looks[0], looks[1], distance):
        yield ours[one], theirs[two], bits


def _listing(near: Sequence[tuple[Record, Record, int]]) -> tuple[str, ...]:
    closest = sorted(near, key=lambda pair: (pair[2], pair[0].name, pair[1].name))[:_MOST]
    return tuple(f"{one.image} ~ {two.image} ({bits} bits)" for one, two, bits in closest)


def _by_digest(part: Scanned) -> dict[str, list[Record]]:
    found = defaultdict(list)
    for record in part.records:
        if record.image_digest:
            found[record.image_digest].append(record)
    return found
