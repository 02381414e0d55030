"""One video or drive on both sides of a split."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations

from dinoseg.data.doctor.findings import Finding, Scanned
from dinoseg.data.splits import regex_group
from dinoseg.data.wording import listed
from dinoseg.errors import UserError


def check_groups(splits: Sequence[Scanned], group: str | None) -> Iterator[Finding]:
    """Yield the groups whose images are on two sides.

    Args:
        splits: what is compared.
        group: regular expression on the name; None: the first folder of the name is the group.
    """
    try:
        sides = {part.split: _by_group(part, regex_group(group) if group else _first_folder) for part in splits}
    except UserError as error:
        yield Finding("error", "group_unknown", str(error), remedy="Correct data.group.")
        return
    for (first, ours), (second, theirs) in combinations(sides.items(), 2):
        if both := sorted(ours.keys() & theirs.keys()):
            told = f"by data.group={group}" if group else "by the first folder of the name"
            yield Finding(
                "error",
                "group_on_both_sides",
                f"{len(both)} videos or drives ({told}) are in {first} and in {second}: {listed(both, 10)}. Their "
                "frames are nearly the same, so the score would be too high.",
                tuple(file for name in both for file in (*ours[name], *theirs[name])),
                "Keep all frames of one on one side, as data.folds with data.group does. If the folders are not videos "
                "or drives, say what is: data.group=<regular expression on the name>.",
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
