"""Which names are for training and which for validation: by file list, or by a seeded share of groups."""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath

from dinoseg.errors import UserError
from dinoseg.images import IMAGE_SUFFIXES
from dinoseg.shapes import SegmentationData


def fraction_split(
    names: Sequence[str], *, val_fraction: float, seed: int, group: Callable[[str], str] = str
) -> dict[str, list[str]]:
    """Split names into `train` and `val`, keeping each group on one side; at least one group on each.

    The groups are ordered by a hash of seed and name, so neither the file system, the machine nor a
    library's version has a say, and an added group moves few others.

    Raises:
        UserError: `val_fraction` is not between 0 and 1, or there are fewer than two groups.
    """
    if not 0 < val_fraction < 1:
        raise UserError(f"val_fraction={val_fraction}: give a share between 0 and 1, such as 0.2.")
    groups = sorted({group(name) for name in names}, key=lambda key: _shuffle_key(key, seed))
    if len(groups) < 2:
        raise UserError(
            f"Cannot split {len(groups)} group(s) of images ({', '.join(groups) or 'none'}) into train and "
            "val: at least two are needed. Add data, or give the splits as folders or file lists."
        )
    count = min(max(1, round(val_fraction * len(groups))), len(groups) - 1)
    held_out = set(groups[:count])
    return {
        "train": sorted(name for name in names if group(name) not in held_out),
        "val": sorted(name for name in names if group(name) in held_out),
    }


def regex_group(pattern: str | None) -> Callable[[str], str]:
    """Return the function from a name to its group: the pattern's first bracket, or its whole match.

    Raises:
        UserError: the pattern is no regular expression; later, a name that it does not match.
    """
    if pattern is None:
        return str
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise UserError(f"data.source.partition.group={pattern} is no regular expression: {error}.") from None

    def group(name: str) -> str:
        found = expression.search(name)
        if found is None:
            raise UserError(f"data.source.partition.group={pattern} does not match the name {name}: widen it.")
        return found.group(1 if expression.groups else 0) or ""

    return group


def read_name_list(path: Path) -> list[str]:
    """Read one name per line; an image ending is dropped, blank lines do not count.

    Raises:
        UserError: the file is missing, no text, empty, or names something twice.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"Cannot read the file list {path}: {error}. Check data.source.partition.lists.") from None
    names = [_without_ending(line.strip()) for line in text.splitlines() if line.strip()]
    if not names:
        raise UserError(f"The file list {path} is empty: write one name per line.")
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise UserError(f"The file list {path} names {', '.join(twice[:5])} more than once: keep one line each.")
    return names


def split_table(datasets: Mapping[str, SegmentationData]) -> dict[str, list[str]]:
    """Return the names in each split, to be written beside a run's results."""
    return {split: list(data.names) for split, data in datasets.items()}


def _shuffle_key(name: str, seed: int) -> tuple[bytes, str]:
    return hashlib.sha256(f"{seed}/{name}".encode()).digest(), name


def _without_ending(name: str) -> str:
    path = PurePosixPath(name)
    return str(path.with_suffix("")) if path.suffix.lower() in IMAGE_SUFFIXES else str(path)
