"""Advice on the class table: similar names, unseen classes, and ignored pixels."""

from collections.abc import Iterator, Sequence

import numpy as np

from dinoseg.data.checks.findings import Finding, ScannedSplit, share
from dinoseg.utils.wording import count_of, join_names

_MUCH_VOID = 0.3  # share of ignored pixels above which a split gets a warning


def check_coverage(splits: Sequence[ScannedSplit]) -> Iterator[Finding]:
    """Yield findings about similar names, ignored pixels, and classes that some split lacks."""
    yield from _similar_names(splits)
    for part in splits:
        yield from _much_void(part)
    if any(part.num_labelled for part in splits):
        yield from _unseen(splits)


def _similar_names(splits: Sequence[ScannedSplit]) -> Iterator[Finding]:
    by_name: dict[str, list[str]] = {}
    for name in map(str, splits[0].classes):
        by_name.setdefault(" ".join(name.split()).casefold(), []).append(name)
    for names in (names for names in by_name.values() if len(names) > 1):
        yield Finding(
            "warning",
            "similar_class_names",
            f"Classes that differ only in spaces or case: {', '.join(map(repr, names))}. Each is a separate class.",
            remedy="Give objects of one class one name in the annotation files or in data.classes.",
        )


def _unseen(splits: Sequence[ScannedSplit]) -> Iterator[Finding]:
    seen = {part.split: part.counts > 0 for part in splits}
    anywhere = np.any(list(seen.values()), axis=0)
    never = _class_names(~anywhere, splits[0])
    if never and "train" in seen:
        yield Finding(
            "warning",
            "class_never_seen",
            f"In no mask at all: {join_names(never, 20)} ({len(never)} of "
            f"{count_of(len(anywhere), 'class', 'classes')}).",
            remedy="Check the class table (data.classes) and the masks: a wrong label map drops classes like this.",
        )
    train = seen.get("train")
    for split, present in seen.items():
        if split == "train" or train is None:
            continue
        if untaught := _class_names(present & ~train, splits[0]):
            yield Finding(
                "warning",
                "class_not_in_train",
                f"In {split} but not in train: {join_names(untaught, 20)}. These classes cannot be learned.",
                remedy="Split the data differently. Merging or ignoring classes (data.reader.masks.ids) changes what "
                "the scores measure.",
            )
        if unscored := _class_names(train & ~present, splits[0]):
            yield Finding(
                "warning" if split == "val" else "note",
                "class_only_in_train",
                f"In train but not in {split}: {join_names(unscored, 20)}. Their score on {split} is undefined.",
                remedy="Split the data differently, or note that mIoU is the mean over the classes present.",
            )


def _class_names(chosen: np.ndarray, part: ScannedSplit) -> list[str]:
    indices = [int(index) for index in np.flatnonzero(chosen) if index != part.ignore_index]
    return [f"{index} {part.classes[index]}" for index in indices]


def _much_void(part: ScannedSplit) -> Iterator[Finding]:
    labelled = part.num_labelled
    if not labelled:  # an error of `check_labels`
        return
    if part.void / (labelled + part.void) > _MUCH_VOID:
        yield Finding(
            "warning",
            "much_void",
            f"{share(part.void, labelled + part.void)} of the pixels of {part.split} are ignored "
            f"({part.ignore_index}).",
            remedy="Check the ids that are ignored: data.ignore_index, data.reader.masks.ids.",
        )
    empty = [record.mask for record in part.records if record.mask_digest and not part.count_labelled(record)]
    if empty:
        yield Finding(
            "warning",
            "all_void",
            f"{count_of(empty, 'mask')} of {part.split} with ignored pixels only.",
            tuple(empty),
            "Remove these pairs, or label them: they count neither in training nor in scores.",
        )
