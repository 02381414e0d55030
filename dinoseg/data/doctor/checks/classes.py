"""Checks of masks against the class table: unseen classes, ignored pixels, and labels of another meaning."""

from collections.abc import Iterator, Sequence

import numpy as np

from dinoseg.data.doctor.findings import Finding, Scanned, share
from dinoseg.utils.wording import count_of, join_names

_BINARY = "data.reader.masks.format=binary"
_MUCH_VOID = 0.3  # share of ignored pixels above which a split gets a warning
_IDD_CLASSES = 26  # of level 3
_OF_IDD = {"road", "rail track", "autorickshaw", "obs-str-bar-fallback"}


def check_classes(splits: Sequence[Scanned], data_name: str = "") -> Iterator[Finding]:
    """Yield findings about labels that teach nothing or something else; `data_name` is the option of `data=`."""
    yield from _one_class(splits)
    yield from _binary_as_ids(splits)
    yield from _home_made_idd(splits, data_name)
    for part in splits:
        yield from _no_labels(part)


def check_coverage(splits: Sequence[Scanned]) -> Iterator[Finding]:
    """Yield findings about similar names, ignored pixels, and classes that some split lacks."""
    yield from _similar_names(splits)
    for part in splits:
        yield from _much_void(part)
    if any(part.counts.any() for part in splits):
        yield from _unseen(splits)


def _one_class(splits: Sequence[Scanned]) -> Iterator[Finding]:
    part = splits[0]
    if len(part.classes) == 1:
        yield Finding(
            "error",
            "one_class",
            f"data.classes has one class, {part.classes[0]}: every model predicts it for every pixel.",
            remedy=f"Name the other pixels too, such as data.classes=[background,{part.classes[0]}]; for masks of 0 "
            f"and 255 add {_BINARY}.",
        )


def _similar_names(splits: Sequence[Scanned]) -> Iterator[Finding]:
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


def _binary_as_ids(splits: Sequence[Scanned]) -> Iterator[Finding]:
    for part in splits:
        values = _values(part)
        is_class = (part.masks.ids or {}).get(255, part.ignore_index) not in (part.ignore_index, -1)
        if part.masks.format != "ids" or len(part.classes) < 2 or is_class:
            continue
        if "255" in values and values <= {"0", "255"}:
            meaning = (
                "255 is ignored, so there is nothing to learn" if part.ignore_index == 255 else "255 is not a class"
            )
            yield Finding(
                "error" if part.split == "train" else "warning",
                "binary_read_as_ids",
                f"The masks of {part.split} hold only 0 and 255, and are read as class numbers: {meaning}.",
                remedy="If they mean background and object, "
                + (
                    "write `masks: binary` in classes.yaml."
                    if part.masks.described
                    else f"add {_BINARY} to the command line."
                ),
            )


def _home_made_idd(splits: Sequence[Scanned], data_name: str) -> Iterator[Finding]:
    part = splits[0]
    of_idd = data_name.startswith("idd") or set(part.classes) >= _OF_IDD
    if not of_idd or len(part.classes) != _IDD_CLASSES or part.masks.format != "ids":
        return
    values = set().union(*map(_values, splits))
    if values and not values & {"0", "3"}:
        yield home_made([record.mask for part in splits for record in part.records], data_name)


def home_made(files: Sequence[str], data_name: str) -> Finding:
    """Return the finding that a faulty conversion has removed road from IDD label maps.

    It stops training, unless `data_name` is the option that repeats such a run on purpose.
    """
    return Finding(
        "error",
        "home_made_idd",
        "No label map holds 0 (road) or 3 (rail track): these labels look home-made or remapped. In IDD 255 is void "
        "(unlabelled, ego vehicle, out of the region), not road, and road is 0. A model trained on these labels never "
        "predicts road; with 255 read as road, it learns void as road.",
        tuple(files),
        "Make the label maps again from the polygon files: mode=prepare data=idd.",
        stops=data_name != "idd_home_made",
    )


def _values(part: Scanned) -> set[str]:
    return set().union(*(record.raw for record in part.records))


def _unseen(splits: Sequence[Scanned]) -> Iterator[Finding]:
    seen = {part.split: part.counts > 0 for part in splits}
    anywhere = np.any(list(seen.values()), axis=0)
    never = _named(~anywhere, splits[0])
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
        if untaught := _named(present & ~train, splits[0]):
            yield Finding(
                "warning",
                "class_not_in_train",
                f"In {split} but not in train: {join_names(untaught, 20)}. These classes cannot be learned.",
                remedy="Split the data differently, or merge or ignore these classes (data.reader.masks.ids).",
            )
        if unscored := _named(train & ~present, splits[0]):
            yield Finding(
                "warning" if split == "val" else "note",
                "class_only_in_train",
                f"In train but not in {split}: {join_names(unscored, 20)}. Their score on {split} is undefined.",
                remedy="Split the data differently, or note that mIoU is the mean over the classes present.",
            )


def _named(chosen: np.ndarray, part: Scanned) -> list[str]:
    indices = [int(index) for index in np.flatnonzero(chosen) if index != part.ignore_index]
    return [f"{index} {part.classes[index]}" for index in indices]


def _no_labels(part: Scanned) -> Iterator[Finding]:
    if part.void and not part.counts.any():
        yield Finding(
            "warning" if part.split == "test" else "error",
            "no_labels",
            f"There is no labelled pixel in {part.split}: all are ignored ({part.ignore_index}).",
            remedy="Check the ids that are ignored: data.ignore_index, data.reader.masks.ids.",
        )


def _much_void(part: Scanned) -> Iterator[Finding]:
    labelled = int(part.counts.sum())
    if not labelled:  # an error of `check_classes`
        return
    if part.void / (labelled + part.void) > _MUCH_VOID:
        yield Finding(
            "warning",
            "much_void",
            f"{share(part.void, labelled + part.void)} of the pixels of {part.split} are ignored "
            f"({part.ignore_index}).",
            remedy="Check the ids that are ignored: data.ignore_index, data.reader.masks.ids.",
        )
    empty = [record.mask for record in part.records if set(record.pixels) == {part.ignore_index}]
    if empty:
        yield Finding(
            "warning",
            "all_void",
            f"{count_of(empty, 'mask')} of {part.split} with ignored pixels only.",
            tuple(empty),
            "Remove these pairs, or label them: they count neither in training nor in scores.",
        )
