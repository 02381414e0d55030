"""Errors of a dataset, which stop a training; they are found by its masks and the headers of its images.

Files that cannot be read or do not fit are described in `checks/files.py`. The errors here are labels that teach
nothing or something else, and images on both sides of the split. The other modules of `checks` only advise.
"""

import logging
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

from dinoseg.core.channels import ChannelFiles
from dinoseg.core.shapes import SegmentationData
from dinoseg.core.sources import read_peaks, read_source
from dinoseg.data.checks.files import check_files, check_range
from dinoseg.data.checks.findings import Finding, ScannedSplit, by_severity
from dinoseg.data.classes.masks import Masks
from dinoseg.data.custom import CustomDataset
from dinoseg.data.pairs.dataset import PairDataset
from dinoseg.data.pairs.pair import image_hash
from dinoseg.data.scan.measure import Record
from dinoseg.data.scan.scan import scan
from dinoseg.data.splits import regex_group
from dinoseg.utils.errors import UserError
from dinoseg.utils.wording import count_of, join_names, list_first, printable

log = logging.getLogger(__name__)

_BINARY = "data.reader.masks.format=binary"
_NEARLY_ALL = 0.9  # share of the smaller split above which two splits count as the same
_INDENT = "    "  # of files below their error
_FULL = "mode=doctor with the same data= lists all files, in doctor.json and doctor.html."


def describe_split(split: str, dataset: PairDataset | CustomDataset, records: Sequence[Record]) -> ScannedSplit:
    """Return a split's records together with the classes and mask rules of its reader."""
    masks = dataset.reader.masks if isinstance(dataset, PairDataset) else Masks()
    return ScannedSplit(
        *(split, records, dataset.classes, dataset.palette, dataset.ignore_index, masks),
        split_local_names=dataset.split_local_names,
        has_layers=dataset.has_layers,
        check_labels=dataset.source.check_labels if isinstance(dataset, PairDataset) else None,
    )


def find_errors(
    splits: Sequence[ScannedSplit], *, group: str | None = None, has_objects: bool = False
) -> list[Finding]:
    """Return what stops a training or makes its scores worthless, errors first.

    Args:
        splits: one or more splits with the same class table.
        group: regular expression on the name that gives an image's group; None: the name's first folder.
        has_objects: whether the task trains on objects, which can be found of a single class, too.
    """
    labels = check_labels(splits, has_objects=has_objects)
    return by_severity([*check_files(splits), *labels, *check_same_files(splits), *check_groups(splits, group)])


def check_for_errors(
    train: SegmentationData,
    val: SegmentationData,
    *,
    cache_dir: str | Path,
    workers: int = 2,
    group: str | None = None,
    has_objects: bool = False,
) -> list[ScannedSplit]:
    """Refuse data with errors; return the records of both splits' masks, which are cached in `cache_dir`.

    Errors that only the user can judge, such as a video in both splits,
    are logged as warnings. Datasets other than `PairDataset` are not checked.

    Raises:
        UserError: a problem would stop the run later, or leaves no labels to train on; or the first image of a split
            has another number of channels.
    """
    if not (isinstance(train, PairDataset) and isinstance(val, PairDataset)):
        return []
    sides = {"train": train, "val": val}
    splits = []
    for split, data in sides.items():
        records = scan(data.pairs, data.reader, images=False, workers=workers, cache_dir=cache_dir)
        splits.append(describe_split(split, data, records))
    findings = find_errors(splits, group=group, has_objects=has_objects)
    errors = [finding for finding in findings if finding.severity == "error" and finding.stops]
    for finding in findings:
        if finding not in errors:
            _warn(finding)
    if errors:
        messages = "".join(
            f"\n- {error.message}{list_first(error.lines, _INDENT)}\n  {error.remedy}".rstrip() for error in errors
        )
        raise UserError(printable(f"The dataset has errors that stop a training:{messages}\n{_FULL}"))
    if all(data.pairs and isinstance(data.pairs[0].image, ChannelFiles) for data in sides.values()):
        _check_first_images(list(sides.values()), splits)
    return splits


def _warn(finding: Finding) -> None:
    files = f" ({join_names(finding.files, 3)})" if finding.files else ""
    log.warning("data: %s", printable(f"{finding.message}{files} {finding.remedy}".rstrip()))


def _check_first_images(datasets: Sequence[PairDataset], splits: Sequence[ScannedSplit]) -> None:
    """Refuse images of another number of channels, and warn of dark ones: the scan reads headers, which show neither.

    Images that are read as RGB need no check: reading them refuses or converts their channels, and warns of 16
    bits.
    """
    samples = []
    for data, part in zip(datasets, splits, strict=True):
        image = data.pairs[0].image
        first = replace(part.records[0], peaks=read_peaks(image, read_source(image)))
        samples.append(replace(part, records=[first]))
    for finding in check_range(samples):
        _warn(finding)


def check_labels(splits: Sequence[ScannedSplit], *, has_objects: bool = False) -> Iterator[Finding]:
    """Yield findings about labels that teach nothing or something else; arguments as of `find_errors`."""
    if not has_objects:
        yield from _check_number_of_classes(splits)
    yield from _check_binary_as_ids(splits)
    check_of_reader = splits[0].check_labels
    if check_of_reader is not None:
        yield from check_of_reader(splits)
    for part in splits:
        yield from _check_labelled_pixels(part)


def _check_number_of_classes(splits: Sequence[ScannedSplit]) -> Iterator[Finding]:
    part = splits[0]
    if len(part.classes) == 1 and not part.has_layers:
        yield Finding(
            "error",
            "one_class",
            f"data.classes has one class, {part.classes[0]}: every model predicts it for every pixel.",
            remedy="Name the classes of all ids, in their order: of masks of 0 and 1, such as data.classes=[background,"
            f"{part.classes[0]}]; for masks of 0 and 255 add {_BINARY}.",
        )


def _check_binary_as_ids(splits: Sequence[ScannedSplit]) -> Iterator[Finding]:
    for part in splits:
        is_class = (part.masks.ids or {}).get(255, part.ignore_index) not in (part.ignore_index, -1)
        is_single = len(part.classes) < 2 and not part.has_layers
        if part.masks.format != "ids" or is_single or is_class:
            continue
        for where, values in _collect_mask_values(part).items():
            if values == {"0", "255"}:
                yield Finding(
                    "error" if part.split == "train" else "warning",
                    "binary_read_as_ids",
                    f"The masks of {where} hold only 0 and 255, and are read as class numbers: 255 is ignored or no "
                    "class, so there is nothing to learn.",
                    remedy="If they mean background and object, "
                    + (
                        "write `masks: binary` in classes.yaml."
                        if part.masks.described
                        else f"add {_BINARY} to the command line."
                    ),
                )


def _collect_mask_values(part: ScannedSplit) -> dict[str, set[str]]:
    """Return the values in a split's masks, of layers those of each class, by what they are the masks of."""
    values = _collect_values(part)
    if not part.has_layers:
        return {part.split: values}
    return {
        f"{name} in {part.split}": {value for value in ("0", "1", "255") if f"{index}: {value}" in values}
        for index, name in enumerate(part.classes)
    }


def _collect_values(part: ScannedSplit) -> set[str]:
    return set().union(*(record.raw for record in part.records))


def _check_labelled_pixels(part: ScannedSplit) -> Iterator[Finding]:
    if part.void and not part.num_labelled:
        yield Finding(
            "warning" if part.split == "test" else "error",
            "no_labels",
            f"There is no labelled pixel in {part.split}: all are ignored ({part.ignore_index}).",
            remedy="Check the ids that are ignored: data.ignore_index, data.reader.masks.ids.",
        )


def check_same_files(splits: Sequence[ScannedSplit]) -> Iterator[Finding]:
    """Yield a finding of the images of two splits that are one file, or a copy of it.

    A copy has the same name, the same mask of several classes and the same content. Training stops if nearly all of a
    split are the other's very files; copies only log a warning.
    """
    for first, second in combinations(splits, 2):
        both = same_files(first, second)
        if not both:
            continue
        most = _NEARLY_ALL * min(len(first.records), len(second.records))
        yield Finding(
            "error",
            "same_files",
            f"{count_of(both, 'file')} of {count_of(second.records, 'image')} of {second.split} also in "
            f"{first.split}. Scores of training images are meaningless.",
            tuple(f"{one.image} = {two.image}" for one, two in both),
            f"Give {second.split} separate images: other folders (data.reader.layout), other lists, or a share of one "
            "folder (data.reader.partition.by=fraction).",
            stops=sum(map(_is_one_file, both)) >= most,
        )


def same_files(first: ScannedSplit, second: ScannedSplit) -> list[tuple[Record, Record]]:
    """Return the pairs of the second split that are also in the first, each preceded by its twin there."""
    files = {os.path.realpath(record.image): record for record in reversed(first.records)}
    suspects = {_copy_key(record): record for record in reversed(first.records)}
    suspects.pop(None, None)  # images that cannot be compared
    both = []
    for record in second.records:
        twin = files.get(os.path.realpath(record.image))
        suspect = suspects.get(_copy_key(record))
        if twin is None and suspect is not None and _have_same_content(suspect, record):
            twin = suspect
        if twin is not None:
            both.append((twin, record))
    return both


def _is_one_file(pair: tuple[Record, Record]) -> bool:
    return os.path.realpath(pair[0].image) == os.path.realpath(pair[1].image)


def _copy_key(record: Record) -> tuple[str, str, int] | None:
    """Return what copies have in common; the length alone does not identify uncompressed files, such as .npy."""
    if not record.mask_digest or len(record.pixels) < 2 or not os.path.isfile(record.image):
        return None
    return record.name, record.mask_digest, os.path.getsize(record.image)


def _have_same_content(first: Record, second: Record) -> bool:
    """Return whether two images have the same pixels, or the same bytes if one was not decoded."""
    if first.image_digest and second.image_digest:
        return first.image_digest == second.image_digest
    return image_hash(Path(first.image)) == image_hash(Path(second.image))


def check_groups(splits: Sequence[ScannedSplit], group: str | None) -> Iterator[Finding]:
    """Yield findings about groups whose images are on two sides of the split.

    Args:
        splits: the splits to compare.
        group: regular expression on the name; None: the first folder of the name is the group.

    Raises:
        UserError: it is no regular expression, or does not match a name.
    """
    group_of = regex_group(group, "data.group") if group else _first_folder
    sides = {part.split: _group_files(part, group_of) for part in splits if not part.split_local_names}
    for (first, ours), (second, theirs) in combinations(sides.items(), 2):
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


def _group_files(part: ScannedSplit, group: Callable[[str], str]) -> dict[str, list[str]]:
    files = defaultdict(list)
    for record in part.records:
        if name := group(record.name):
            files[name].append(record.image)
    return files


def _first_folder(name: str) -> str:
    folder, slash, _ = name.partition("/")
    return folder if slash else ""
