"""Sides of a comparison: each is one run, or several runs that differ only in their seed."""

import logging
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dinoseg.evaluation.about import EVALUATION
from dinoseg.evaluation.image_record import RECORD, ImageRecord, evaluated, read_record
from dinoseg.experiment import run_config
from dinoseg.experiment.folder import command_line
from dinoseg.utils.errors import UserError
from dinoseg.utils.files import entries
from dinoseg.utils.wording import count_of, format_override, join_names

MAX, _MAX_RUNS = 32, 160  # sides (each has images in the page) and runs
_AGAIN = re.compile(r"\d+_\d+")  # folder name of a repeated job, whose own name was taken
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Side:
    """Runs of one recipe.

    Args:
        name: unique name of the side.
        folders: run folders.
        names: names of the runs.
        places: folders of the evaluations.
        records: records of the runs, with the images in the same order for all sides.
    """

    name: str
    folders: Sequence[Path]
    names: Sequence[str]
    places: Sequence[Path]
    records: Sequence[ImageRecord]


def sides_of(runs: Any) -> list[Side]:
    """Return the sides in `runs`: nested lists are sides; without any, runs are grouped over seeds.

    Raises:
        UserError: there are fewer than two sides or too many, or the runs cannot be compared.
    """
    given = _expand_sweeps(runs)
    folders = [folder for side in given for folder in side]
    twice = [name for name, count in Counter(folder.resolve() for folder in folders).items() if count > 1]
    if twice:
        raise _refusal(runs, f"names {join_names([str(name) for name in twice])} more than once")
    if not 2 <= len(folders) <= _MAX_RUNS:
        raise _refusal(runs, f"names {count_of(folders, 'run')}")
    places = [evaluated(folder) for folder in folders]
    records = aligned({folder: read_record(path) for folder, path in zip(folders, places, strict=True)})
    names, recipes = run_names(folders), run_config.recipes(places)
    if all(len(side) == 1 for side in given):
        sides = _by_seed(recipes)
    else:
        starts = [sum(map(len, given[:number])) for number in range(len(given))]
        sides = [[*range(start, start + len(side))] for start, side in zip(starts, given, strict=True)]
    if not 2 <= len(sides) <= MAX:
        raise _refusal(runs, f"makes {count_of(sides, 'side')}")
    for side in sides:
        _warn_of_others([names[number] for number in side], [recipes[number] for number in side])
    called = side_names(folders, sides)
    return [
        Side(
            name,
            [folders[number] for number in side],
            [names[number] for number in side],
            [places[number] for number in side],
            [records[number] for number in side],
        )
        for name, side in zip(called, sides, strict=True)
    ]


def units_note(sides: Sequence[Side]) -> str:
    """Return a note on the units of the intervals."""
    record = sides[0].records[0]
    units = len(set(record.units))
    if units > 1:
        return f"over {count_of(units, record.unit)}"
    if not _has_intervals(sides):
        return f"none: they need two {record.unit}s, or several seeds of each side"
    single = [side.name for side in sides if len(side.folders) == 1]
    note = f"over seeds only: there is one {record.unit}, so they do not generalise to others"
    return f"{note}; not for {join_names(single)}, one run each" if single else note


def seeds_note(sides: Sequence[Side]) -> str:
    """Return a note on whether the verdicts account for other seeds."""
    single = [side.name for side in sides if len(side.folders) == 1]
    several = [f"{len(side.folders)} of {side.name}" for side in sides if len(side.folders) > 1]
    if not several:
        return "one trained model per side: verdicts hold for these models, not for other seeds"
    summary = join_names(several)
    if not single and len({len(side.folders) for side in sides}) == 1:
        summary = f"{len(sides[0].folders)} runs per side"
    if not _has_intervals(sides):
        return f"their variance is in no interval, since there is none ({summary})"
    counted = f"their variance is included in the intervals ({summary})"
    return f"{counted}, except for {join_names(single)}, one trained model each" if single else counted


def _has_intervals(sides: Sequence[Side]) -> bool:
    """Return whether there are several units, or several runs of the first side and of another."""
    first, *others = [len(side.folders) for side in sides]
    return len(set(sides[0].records[0].units)) > 1 or min(first, max(others)) > 1


def _expand_sweeps(runs: Any) -> list[list[Path]]:
    """Return the folders of each entry; a sweep's folder stands for its jobs that no earlier entry names."""
    if not isinstance(runs, list | tuple):
        raise _refusal(runs, "is not a list")
    found: list[list[Path]] = []
    named: set[Path] = set()
    for entry in runs:
        side = []
        for name in entry if isinstance(entry, list | tuple) else [entry]:
            side += _jobs(name, named)
            named |= {folder.resolve() for folder in side}
        found += [side] if isinstance(entry, list | tuple) else [[folder] for folder in side]
    if not all(found):
        raise _refusal(runs, "has a side without a separate run")
    return found


def _jobs(name: Any, named: Collection[Path]) -> list[Path]:
    folder = Path(str(name)).expanduser()
    if not (folder / SWEEP).is_file():
        return [folder]
    inside = [path for path in entries(folder) if path.is_dir()]
    if again := [path.name for path in inside if _AGAIN.fullmatch(path.name)]:
        logger.warning(
            "%s: left out results of repeated jobs: %s. To compare them, name each, as in runs=[%s,...].",
            folder,
            join_names(again),
            folder / again[0],
        )
    numbered = [job for job in inside if job.name.isdecimal()]
    jobs = sorted(numbered, key=lambda job: int(job.name)) or [job for job in inside if job.name not in again]
    lacking = [job.name for job in jobs if not any((path / RECORD).is_file() for path in (job, job / EVALUATION))]
    if not jobs or len(lacking) == len(jobs):
        raise UserError(f"runs: {folder} is a sweep without an evaluation of images in any job.")
    if lacking:
        logger.warning("%s: jobs without an evaluation of images are left out: %s.", folder, join_names(lacking))
    return [job for job in jobs if job.name not in lacking and job.resolve() not in named]


def _refusal(runs: Any, found: str) -> UserError:
    return UserError(
        f"runs={format_override(runs)} {found}: give 2 to {MAX} different run folders of mode=eval or mode=train, such "
        "as runs=[outputs/a/eval_1,outputs/b/eval_1]; several seeds of each as runs=[[a1,a2,a3],[b1,b2,b3]]; or the "
        f"folder of a sweep. The limit is {_MAX_RUNS} runs in total."
    )


def _by_seed(recipes: Sequence[tuple[dict[str, Any], Any] | None]) -> list[list[int]]:
    """Group the indices of runs that differ only in their seed; if all of them do, each run is a side."""
    sides: list[list[int]] = []
    for number, recipe in enumerate(recipes):
        alike = [side for side in sides if recipe and (first := recipes[side[0]]) and first[0] == recipe[0]]
        if alike:
            alike[0].append(number)
        else:
            sides.append([number])
    alone = [[number] for number in range(len(recipes))]
    if len(sides) == 1:
        logger.info("The runs differ only in their seed: each is a side.")
        return alone
    # runs with equal seeds are not repetitions: compare what differs instead, such as the checkpoint
    seeds = [[recipe[1] for number in side if (recipe := recipes[number])] for side in sides]
    return sorted(
        part
        for side, each in zip(sides, seeds, strict=True)
        for part in ([side] if len({*map(str, each)}) == len(side) else [[number] for number in side])
    )


def _warn_of_others(names: Sequence[str], recipes: Sequence[tuple[dict[str, Any], Any] | None]) -> None:
    known = [recipe[0] for recipe in recipes if recipe]
    keys = dict.fromkeys(key for recipe in known for key in recipe)
    differing = [key for key in keys if any(recipe.get(key) != known[0].get(key) for recipe in known)]
    if differing:
        logger.warning(
            "%s are one side, but differ in more than their seed: %s. The effect of these settings counts as seed "
            "variance.",
            join_names(names),
            join_names(differing),
        )


def aligned(records: dict[Path, ImageRecord]) -> list[ImageRecord]:
    """Return the records with their images in the order of the first record.

    Raises:
        UserError: images, references, classes or splits differ (names the differences).
    """
    (folder, first), *others = records.items()
    found = [first]
    for where, other in others:
        differences = _differences(first, other)
        if not differences:
            positions = {name: index for index, name in enumerate(other.images)}
            order = [positions[name] for name in first.images]
            if [other.units[index] for index in order] != [*first.units]:
                logger.warning(
                    "%s and %s group images differently (data.group): intervals use %s of the second.",
                    where,
                    folder,
                    count_of(len({*first.units}), first.unit),
                )
            other = replace(other, images=first.images, units=first.units, counts=other.counts[order])
            if not np.array_equal(other.counts[:, 1], first.counts[:, 1]):
                changed = np.flatnonzero((other.counts[:, 1] != first.counts[:, 1]).any(axis=1))
                names = join_names([first.images[index] for index in changed.tolist()])
                differences = [f"the references of {count_of(len(changed), 'image')} differ: {names}"]
        if differences:
            reasons = "".join(f"\n- {line}" for line in differences)
            raise UserError(
                f"runs: {folder} and {where} were not evaluated on the same images, so they cannot be "
                f"compared:{reasons}\nEvaluate both on the same data and split, with the same classes and sizes."
            )
        found.append(other)
    return found


def _differences(first: ImageRecord, other: ImageRecord) -> list[str]:
    """Return the reasons why two records cannot be compared, one line each."""
    lines = []
    for name in ("classes", "ignore_index", "background", "split"):
        ours, theirs = getattr(first, name), getattr(other, name)
        if ours != theirs:
            shown = [join_names(each) if isinstance(each, list) else str(each) for each in (ours, theirs)]
            lines.append(f"{name}: {shown[0]} in the first; {shown[1]} in the second")
    missing = [
        sorted({*ours} - {*theirs}) for ours, theirs in ((first.images, other.images), (other.images, first.images))
    ]
    for names, where in zip(missing, ("first", "second"), strict=True):
        if names:
            lines.append(
                f"{count_of(names, 'image')} only in the {where} (data={first.data}, {other.data}): {join_names(names)}"
            )
    return lines


SWEEP = "multirun.yaml"  # in the folder of a sweep
_SEED = "seed"
_LONGEST = 60  # characters: a longer name does not fit a heading


def run_names(folders: Sequence[Path]) -> list[str]:
    """Return short unique names of run folders."""
    names = _by_folders(folders)
    return _by_words(folders, [[index] for index in range(len(folders))], (), names) or names


def side_names(folders: Sequence[Path], sides: Sequence[Sequence[int]]) -> list[str]:
    """Return a name for each side.

    Args:
        folders: folders of all runs.
        sides: indices of each side's runs.
    """
    names = _by_folders(folders)
    joined = [_joined([names[index] for index in side]) for side in sides]
    if len(set(joined)) < len(joined):  # a folder may itself be named 0+1
        joined = [names[side[0]] for side in sides]
    return _by_words(folders, sides, (_SEED,), joined) or _by_words(folders, sides, (), joined) or joined


def _by_words(
    folders: Sequence[Path], sides: Sequence[Sequence[int]], without: Sequence[str], others: Sequence[str]
) -> list[str]:
    """Name each side by the overrides in which the sweep jobs differ; return an empty list if these are not unique.

    Args:
        folders: folders of all runs.
        sides: indices of each side's runs.
        without: keys to leave out of the names.
        others: names of the sides that are not from a sweep.
    """
    commands = [_command(folder) for folder in folders]
    swept = [command for command in commands if command]
    keys = dict.fromkeys(key for command in swept for key in command if not key.startswith("hydra"))
    differing = [key for key in keys if key not in without and len({command.get(key) for command in swept}) > 1]
    words = [" ".join(command[key] for key in differing if key in command) for command in commands]
    of_sides = [
        {words[index] if commands[index] else other for index in side}
        for side, other in zip(sides, others, strict=True)
    ]
    names = [name for side in of_sides for name in side]
    short = all(0 < len(word) <= _LONGEST for word, command in zip(words, commands, strict=True) if command)
    return names if short and len(set(names)) == len(sides) == len(names) else []


def _command(folder: Path) -> dict[str, str]:
    """Return the overrides of a sweep's job by key, without a leading +; empty for other runs."""
    folder = folder.resolve()
    if not (folder.parent / SWEEP).is_file():
        return {}
    try:
        words = command_line(folder)
    except OSError:  # unreadable: fall back to the folder's name
        return {}
    return {word.lstrip("+~").partition("=")[0]: word.lstrip("+") for word in words}


def _by_folders(folders: Sequence[Path]) -> list[str]:
    """Return the shortest path suffixes of the folders that are unique."""
    whole = [folder.resolve().parts for folder in folders]
    for count in range(1, max(map(len, whole)) + 1):
        names = ["/".join(parts[-count:]) for parts in whole]
        if len(set(names)) == len(names):
            break
    return names


def _joined(names: Sequence[str]) -> str:
    """Join several names into one: a/0 and a/1 become a/0+1."""
    head, slash, first = names[0].rpartition("/")
    if all(name.rpartition("/")[0] == head for name in names):
        names = [f"{head}{slash}{first}", *(name.rpartition("/")[2] for name in names[1:])]
    return "+".join(names) if len(names) <= 4 else f"{names[0]}+... ({count_of(names, 'run')})"
