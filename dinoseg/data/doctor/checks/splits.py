"""Checks for data on both sides of a split: the same files, or frames of one video or drive."""

import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations

from dinoseg.data.doctor.findings import Finding, Scanned
from dinoseg.data.scan.measure import Record
from dinoseg.data.splits import regex_group
from dinoseg.utils.errors import UserError
from dinoseg.utils.wording import count_of, join_names

_NEARLY_ALL = 0.9  # share of the smaller split above which two splits count as the same


def check_same_files(splits: Sequence[Scanned]) -> Iterator[Finding]:
    """Yield a finding of the images of two splits that are one file, or a copy of it.

    A copy has the same name, the same length and the same mask of several classes. Training stops if nearly all of a
    split are the other's very files; copies only log a warning.
    """
    for first, second in combinations(splits, 2):
        both = same_files(first, second)
        if not both:
            continue
        most = _NEARLY_ALL * min(len(first.records), len(second.records))
        nearly_all = len(both) >= most
        prefix = f"{first.split} and {second.split} are the same data: " if nearly_all else ""
        yield Finding(
            "error",
            "same_files",
            f"{prefix}{count_of(both, 'file')} of {count_of(second.records, 'image')} of {second.split} also in "
            f"{first.split}. Scores of training images are meaningless.",
            tuple(f"{one.image} = {two.image}" for one, two in both),
            f"Give {second.split} separate images: other folders (data.reader.layout), other lists, or a share of one "
            "folder (data.reader.partition.by=fraction).",
            stops=sum(map(_is_one_file, both)) >= most,
        )


def same_files(first: Scanned, second: Scanned) -> list[tuple[Record, Record]]:
    """Return the pairs of the second split that are also in the first, each preceded by its twin there."""
    twins = {key: record for record in reversed(first.records) for key in _identity(record)}
    both = []
    for record in second.records:
        twin = next((twins[key] for key in _identity(record) if key in twins), None)
        both += [] if twin is None else [(twin, record)]
    return both


def _is_one_file(pair: tuple[Record, Record]) -> bool:
    return os.path.realpath(pair[0].image) == os.path.realpath(pair[1].image)


def _identity(record: Record) -> Iterator[tuple[str | int, ...]]:
    yield (os.path.realpath(record.image),)
    if record.mask_digest and len(record.pixels) > 1 and os.path.isfile(record.image):
        yield record.name, record.mask_digest, os.path.getsize(record.image)


def check_groups(splits: Sequence[Scanned], group: str | None) -> Iterator[Finding]:
    """Yield findings about groups whose images are on two sides of the split.

    Args:
        splits: the splits to compare.
        group: regular expression on the name; None: the first folder of the name is the group.
    """
    try:
        sides = {part.split: _by_group(part, regex_group(group) if group else _first_folder) for part in splits}
    except UserError as error:
        yield Finding("error", "group_unknown", str(error), remedy="Correct data.group.")
        return
    local = {part.split for part in splits if part.split_local_names}
    for (first, ours), (second, theirs) in combinations(sides.items(), 2):
        if {first, second} & local:
            continue
        if both := sorted(ours.keys() & theirs.keys()):
            rule = f"by data.group={group}" if group else "by the first folder of the name"
            yield Finding(
                "error",
                "group_on_both_sides",
                f"{count_of(both, 'video or drive', 'videos or drives')} ({rule}) both in {first} and in {second}: "
                f"{join_names(both, 10)}. Frames of one are nearly the same, so the score is too high. Official splits "
                "can have this (CamVid's has): then compare only with scores on the same split.",
                tuple(file for name in both for file in (*ours[name], *theirs[name])),
                "Put all frames of a video or drive into one split, as data.folds with data.group does. If the folders "
                "are not videos or drives, define the groups: data.group=<regular expression on the name>.",
                stops=False,
            )


def _by_group(part: Scanned, group: Callable[[str], str]) -> dict[str, list[str]]:
    files = defaultdict(list)
    for record in part.records:
        if name := group(record.name):
            files[name].append(record.image)
    return files


def _first_folder(name: str) -> str:
    folder, slash, _ = name.partition("/")
    return folder if slash else ""
