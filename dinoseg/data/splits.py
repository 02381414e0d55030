"""Train/val partitions: by folder, by file list, or by a seeded share of groups."""

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Protocol, TypeVar, cast

from dinoseg.core.sizes import evenly_spaced
from dinoseg.utils.bounded_regex import Pattern
from dinoseg.utils.errors import UserError
from dinoseg.utils.images import IMAGE_SUFFIXES
from dinoseg.utils.ranges import Count, Natural, OpenShare
from dinoseg.utils.wording import count_of, join_names


class Named(Protocol):
    """Object with a name that is unique in its dataset."""

    @property
    def name(self) -> str:
        """Return the name."""
        ...

    @property
    def origin(self) -> str:
        """Return the location of the image or first frame, which distinguishes items of equal name."""
        ...


Item = TypeVar("Item", bound=Named)


@dataclass(frozen=True)
class Partition:
    """Rule that assigns each pair to a split.

    Args:
        by: `folder` (the split's own folders), `lists` (files that name its pairs) or `fraction` (a share of all
            pairs).
        lists: maps each split to a text file below the root with one name per line, for `lists`.
        val_fraction: share of the groups held out, for `fraction`.
        seed: seed of the assignment, for `fraction` and for folds.
        group: regular expression, for `fraction` and folds; names with the same match (its first group) stay together.
        fold: index, from 0, of the fold that is val; the train and val pairs together form `folds` folds. None: no
            folds.
        folds: number of folds of k-fold cross-validation.
    """

    by: Literal["folder", "lists", "fraction"] = "folder"
    lists: Mapping[str, str] | None = None
    val_fraction: OpenShare = 0.2
    seed: Natural = 0
    group: str | None = None
    fold: Natural | None = None
    folds: Count | None = None

    def __post_init__(self) -> None:
        """Reject incomplete or invalid fold settings."""
        fold, folds = self.fold, self.folds
        if (fold is None) != (folds is None) or fold is not None and folds is not None and not 0 <= fold < folds >= 2:
            raise UserError(
                f"fold={fold} with folds={folds}: k-fold cross-validation needs two folds or more, and a fold below "
                "them, from 0, such as fold=0 folds=5."
            )


def divide(split: str, find: Callable[[str], list[Item]], partition: Partition) -> list[Item]:
    """Return the items of a split; `find(split)` gives those that its folders or its file list name.

    With folds, the train and val items are pooled and split again; other splits are unchanged.

    Raises:
        UserError: a split unknown to `fraction`, a name in both train and val, or fewer groups than parts.
    """
    if partition.fold is not None and split in ("train", "val"):
        return _divide_into_folds(split, find, partition)
    if partition.by == "fraction":
        return _divide_by_fraction(split, find, partition)
    return find(split)


def _divide_into_folds(split: str, find: Callable[[str], list[Item]], partition: Partition) -> list[Item]:
    pool = (
        find("train") if partition.by == "fraction" else _merge_items({side: find(side) for side in ("train", "val")})
    )
    names = _fold_split([item.name for item in pool], partition)[split]
    return _select(pool, names)


def _divide_by_fraction(split: str, find: Callable[[str], list[Item]], partition: Partition) -> list[Item]:
    if split not in ("train", "val"):
        raise UserError(f"partition.by=fraction has the splits train and val only, not {split}.")
    pool = find(split)
    if not pool:
        return []
    names = fraction_split(
        [item.name for item in pool],
        val_fraction=partition.val_fraction,
        seed=partition.seed,
        group=regex_group(partition.group, "partition.group"),
    )[split]
    return _select(pool, names)


def _select(pool: Sequence[Item], names: Sequence[str]) -> list[Item]:
    by_name = {item.name: item for item in pool}
    return [by_name[name] for name in names]


def _fold_split(names: Sequence[str], partition: Partition) -> dict[str, list[str]]:
    """Return `train` and `val` of a fold; assign groups one by one to the fold with the fewest names so far."""
    group, folds = regex_group(partition.group, "partition.group"), partition.folds or 0
    sizes = Counter(group(name) for name in names)
    if len(sizes) < folds:
        raise UserError(
            f"partition.folds={folds}: there are only {len(sizes)} groups ({join_names(sorted(sizes))}) to divide. "
            "Give fewer folds, or define more groups: partition.group=PATTERN."
        )
    filled = [0] * folds
    fold_of: dict[str, int] = {}
    for key in sorted(sizes, key=lambda key: (-sizes[key], _shuffle_key(key, partition.seed))):
        fold_of[key] = min(range(folds), key=lambda fold: filled[fold])
        filled[fold_of[key]] += sizes[key]
    return {
        "train": sorted(name for name in names if fold_of[group(name)] != partition.fold),
        "val": sorted(name for name in names if fold_of[group(name)] == partition.fold),
    }


def _merge_items(items: Mapping[str, Sequence[Item]]) -> list[Item]:
    """Return the items of several splits; append the split to each name if any name occurs in several splits.

    Raises:
        UserError: one item is in two splits.
    """
    names = Counter(item.name for side in items.values() for item in side)
    repeated = {name for name, count in names.items() if count > 1}
    if not repeated:
        return [item for side in items.values() for item in side]
    origins = Counter((item.name, item.origin) for side in items.values() for item in side if item.name in repeated)
    if twice := sorted(name for (name, _), count in origins.items() if count > 1):
        raise UserError(
            f"{count_of(twice, 'name')} in train and in val ({join_names(twice)}) with the same file, so folds cannot "
            "distinguish them: remove it from one split."
        )
    return [replace(cast(Any, item), name=f"{item.name}-{split}") for split, side in items.items() for item in side]


def fraction_split(
    names: Sequence[str], *, val_fraction: OpenShare, seed: int, group: Callable[[str], str] = str
) -> dict[str, list[str]]:
    """Split names into `train` and `val`, keeping each group on one side; each side gets at least one group.

    The groups are ordered by a hash of seed and name. The order therefore depends on neither file system, machine nor
    library version, and an added group moves few others.

    Raises:
        UserError: there are fewer than two groups.
    """
    groups = sorted({group(name) for name in names}, key=lambda key: _shuffle_key(key, seed))
    if len(groups) < 2:
        raise UserError(
            f"Cannot split {len(groups)} group(s) of images ({', '.join(groups) or 'none'}) into train and val: at "
            "least two are needed. Add data, or define the splits by folders or file lists."
        )
    count = min(max(1, round(val_fraction * len(groups))), len(groups) - 1)
    held_out = set(groups[:count])
    return {
        "train": sorted(name for name in names if group(name) not in held_out),
        "val": sorted(name for name in names if group(name) in held_out),
    }


def regex_group(pattern: str | None, parameter: str = "group") -> Callable[[str], str]:
    """Return a function that maps a name to its group: the pattern's first capture group, or its whole match.

    Args:
        pattern: a regular expression; None: each name is a group.
        parameter: what sets the pattern, for messages.

    Raises:
        UserError: the pattern is not a regular expression; later, the pattern or its first group does not match a name.
    """
    if pattern is None:
        return str
    expression = Pattern(pattern, parameter)

    def group(name: str) -> str:
        match = expression.search(name)
        key = None if match is None else match.group(1 if expression.groups else 0)
        if key is None:
            raise UserError(
                f"{parameter}={pattern} does not match the name {name}, or its first parenthesised group, which "
                "defines the data group, does not. Widen it, or write other parentheses as (?:...)."
            )
        return key

    return group


def group_names(pattern: str | None, names: Sequence[str], parameter: str) -> dict[str, str]:
    """Return the group of each name by a regular expression, see `regex_group`; empty without one.

    Raises:
        UserError: the pattern is no regular expression, or does not match a name.
    """
    if pattern is None:
        return {}
    group = regex_group(pattern, parameter)
    return {name: group(name) for name in names}


def find_groups(pattern: str | None, names: Sequence[str], parameter: str) -> tuple[dict[str, str], list[str]]:
    """Return the groups as `group_names` does, and notes; without groups if the pattern is for names of other data."""
    try:
        return group_names(pattern, names, parameter), []
    except UserError as error:
        return {}, [f"{error} Until then each image or video is a unit of the intervals, which may be too narrow."]


def file_list(split: str, partition: Partition) -> str:
    """Return the file that names the items of a split.

    Raises:
        UserError: there is none.
    """
    lists = partition.lists or {}
    if split not in lists:
        raise UserError(
            f"No file list for split {split}: partition.lists has {', '.join(lists) or 'none'}. Add `{split}: <file>`."
        )
    return lists[split]


def read_name_list(path: Path, parameter: str = "lists") -> list[str]:
    """Read one name per line; drop image suffixes and blank lines.

    Args:
        path: the file.
        parameter: what sets the path, for messages.

    Raises:
        UserError: the file is missing, not text, empty, or holds a name twice.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{parameter}={path}: cannot read this file list ({error}). Check the path.") from None
    names = [_strip_extension(line.strip()) for line in text.splitlines() if line.strip()]
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice or not names:
        repeated = f", more than once: {join_names(twice)}" if twice else ""
        raise UserError(
            f"{parameter}={path}: this file list has {count_of(names, 'name')}{repeated}. Write each name once, on a "
            "line of its own."
        )
    return names


def labelled_names(
    names: Sequence[str], labelled: float | str, *, seed: int = 0, group: str | None = None
) -> list[str]:
    """Return the names of a training split whose masks are used.

    With one seed, a smaller share is a subset of a larger one. Whole groups are taken in turn, and only the last may be
    cut, so that few masks come from few videos.

    Args:
        names: names of the whole split.
        labelled: share of the names to use, at least one name; or a text file with one name per line.
        seed: seed of the selection.
        group: see `Partition`; None: each image is a group.

    Raises:
        UserError: the file cannot be read, or names an image outside the split.
    """
    if isinstance(labelled, str):
        wanted = read_name_list(Path(labelled).expanduser(), "labelled")
        if absent := sorted(set(wanted) - set(names)):
            raise UserError(
                f"labelled={labelled}: {len(absent)} of its names are not in the training split: "
                f"{join_names(absent)}. Names have the form {join_names(names, 2)}."
            )
        return wanted
    key = regex_group(group)
    ordered = sorted(names, key=lambda name: (_shuffle_key(key(name), seed), _shuffle_key(name, seed)))
    return ordered[: max(1, round(labelled * len(names)))]


def _shuffle_key(name: str, seed: int) -> tuple[bytes, str]:
    return hashlib.sha256(f"{seed}/{name}".encode(errors="surrogateescape")).digest(), name


def _strip_extension(name: str) -> str:
    path = PurePosixPath(name)
    return str(path.with_suffix("")) if path.suffix.lower() in IMAGE_SUFFIXES else str(path)


def evenly_spaced_subset(data: Any, count: Count | None) -> Any:
    """Return a dataset of at most `count` evenly spaced samples; None: all samples."""
    if count is None or count >= len(data):
        return data
    return data.keep({data.names[index] for index in evenly_spaced(len(data), count)})
