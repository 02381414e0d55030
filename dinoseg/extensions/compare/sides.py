"""Sides of a comparison: each is one run, or several runs that differ only in their seed."""

import logging
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dinoseg.checkpoints import run_config
from dinoseg.evaluation.image_record import RECORD, ImageRecord, find_evaluation, read_record
from dinoseg.evaluation.run_facts import EVALUATION
from dinoseg.evaluation.unit_scores import FurtherScore, shared_scores
from dinoseg.runs.folder import command_line
from dinoseg.utils.errors import UserError
from dinoseg.utils.files import entries, is_sweep_folder
from dinoseg.utils.wording import count_of, format_override, join_names

MAX, _MAX_RUNS = 32, 160  # sides (each has images in the page) and runs
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

    Args:
        runs: folders of runs and sweeps, and lists of these; or one folder.

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
    places = [find_evaluation(folder) for folder in folders]
    records = align_records({folder: read_record(path) for folder, path in zip(folders, places, strict=True)})
    names = side_names(folders, [[number] for number in range(len(folders))])
    recipes = run_config.recipes(places)
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
    units = record.count_units()
    if units > 1:
        return f"over {count_of(units, record.unit)}"
    if not _has_intervals(sides):
        return (
            f"none: they need two {record.unit}s, or several seeds of each side. For other groups, evaluate each run "
            "again with mode=eval resume=RUN data.group=PATTERN"
        )
    single = [side.name for side in sides if len(side.folders) == 1]
    note = f"over seeds only: there is one {record.unit}, so they do not generalise to others"
    return f"{note}; not for {join_names(single)}, one run each" if single else note


def seeds_note(sides: Sequence[Side]) -> str:
    """Return a note on whether the verdicts account for other seeds."""
    single = [side.name for side in sides if len(side.folders) == 1]
    if len(single) == len(sides):
        return "one trained model per side: verdicts hold for these models, not for other seeds"
    runs = ", ".join(str(len(side.folders)) for side in sides)
    if not _has_intervals(sides):
        return f"the variance over seeds is in no interval, since there is none ({runs} runs)"
    counted = f"the variance over seeds is included in the intervals ({runs} runs)"
    return f"{counted}, except for {join_names(single)}, one trained model each" if single else counted


def _has_intervals(sides: Sequence[Side]) -> bool:
    """Return whether there are several units, or several runs of the first side and of another."""
    first, *others = [len(side.folders) for side in sides]
    return sides[0].records[0].count_units() > 1 or min(first, max(others)) > 1


def _expand_sweeps(runs: Any) -> list[list[Path]]:
    """Return the folders of each entry; a sweep's folder stands for its jobs that no earlier entry names."""
    if runs is None:
        raise _refusal(runs, "names no run")
    found: list[list[Path]] = []
    named: set[Path] = set()
    for entry in [runs] if isinstance(runs, str) else runs:
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
    if not is_sweep_folder(folder):
        return [folder]
    inside = [path for path in entries(folder) if path.is_dir()]
    numbered = [path for path in inside if path.name.isdecimal()]
    jobs = sorted(numbered, key=lambda job: int(job.name)) or inside
    found = [job for job in jobs if any((path / RECORD).is_file() for path in (job, job / EVALUATION))]
    if not found:
        raise UserError(
            f"runs: {folder} is a sweep without an evaluation of images in any job, as with mode.report=false. "
            "Evaluate each: python -m dinoseg mode=eval resume=RUN, where RUN is the job's folder. Then compare the "
            "new run folders."
        )
    # such as 1_2, a job that was repeated in the same folder
    if left_out := [path.name for path in inside if path not in found]:
        logger.warning(
            "%s: folders that are no jobs with an evaluation of images are left out: %s.", folder, join_names(left_out)
        )
    return [job for job in found if job.resolve() not in named]


def _refusal(runs: Any, found: str) -> UserError:
    return UserError(
        f"runs={format_override(runs)} {found}. Give at least two run folders of mode=eval or mode=train, such as "
        "runs=[outputs/a/eval_1,outputs/b/eval_1]; several seeds of each as runs=[[a1,a2,a3],[b1,b2,b3]]; or the "
        f"folder of a sweep. At most {MAX} sides and {_MAX_RUNS} runs can be compared."
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


def align_records(records: dict[Path, ImageRecord]) -> list[ImageRecord]:
    """Return the records with their images in the order of the first record.

    Raises:
        UserError: tasks, images, references, classes or splits differ (names the differences).
    """
    (folder, first), *others = records.items()
    found = [first]
    for where, other in others:
        differences = _differences(first, other)
        if not differences:
            positions = {name: index for index, name in enumerate(other.images)}
            order = [positions[name] for name in first.images]
            scores: Mapping[str, FurtherScore] = {}
            if [other.units[index] for index in order] != [*first.units]:
                logger.warning(
                    "%s and %s group images differently (data.group): intervals use %s of the second.",
                    where,
                    folder,
                    count_of(first.count_units(), first.unit),
                )
            else:
                places = {unit: index for index, unit in enumerate(dict.fromkeys(other.units))}
                by_unit = [places[unit] for unit in dict.fromkeys(first.units)]
                scores = {
                    name: replace(
                        score,
                        left_out=[score.left_out[index] for index in by_unit],
                        scored=[score.scored[index] for index in by_unit],
                    )
                    for name, score in other.scores.items()
                }
            other = replace(other, images=first.images, units=first.units, counts=other.counts[order], scores=scores)
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
    shared = shared_scores([record.scores for record in found])
    if lost := sorted({name for record in found for name in record.scores} - {*shared}):
        logger.warning(
            "Not all runs have these scores, with the same settings, so they are left out: %s.", ", ".join(lost)
        )
    return [replace(record, scores={name: record.scores[name] for name in shared}) for record in found]


def _differences(first: ImageRecord, other: ImageRecord) -> list[str]:
    """Return the reasons why two records cannot be compared, one line each."""
    lines = []
    for name in ("task", "classes", "ignore_index", "background", "split"):
        ours, theirs = getattr(first, name), getattr(other, name)
        if ours != theirs:
            texts = [join_names(each) if isinstance(each, list) else str(each) for each in (ours, theirs)]
            lines.append(f"{name}: {texts[0]} in the first; {texts[1]} in the second")
    missing = [
        sorted({*ours} - {*theirs}) for ours, theirs in ((first.images, other.images), (other.images, first.images))
    ]
    for names, where in zip(missing, ("first", "second"), strict=True):
        if names:
            lines.append(
                f"{count_of(names, 'image')} only in the {where} (data={first.data}, {other.data}): {join_names(names)}"
            )
    return lines


_LONGEST = 60  # characters: a longer name does not fit a heading


def side_names(folders: Sequence[Path], sides: Sequence[Sequence[int]]) -> list[str]:
    """Return a unique name for each side: the words that its runs share and that vary in their sweep, else its folders.

    Args:
        folders: folders of all runs.
        sides: indices of each side's runs.
    """
    by_folder = _by_folders(folders)
    commands = [_command(folder) for folder in folders]
    swept = [command for command in commands if command]
    keys = dict.fromkeys(key for command in swept for key in command if not key.startswith(("hydra", "resume")))
    varied = [key for key in keys if len({command.get(key) for command in swept}) > 1]
    names = []
    for side in sides:
        of_side = [commands[index] for index in side]
        shared = [key for key in varied if key in of_side[0] and len({command.get(key) for command in of_side}) == 1]
        words = " ".join(of_side[0][key] for key in shared)
        names.append(words if 0 < len(words) <= _LONGEST else _join_run_names([by_folder[index] for index in side]))
    return names if len(set(names)) == len(names) else [by_folder[side[0]] for side in sides]


def _command(folder: Path) -> dict[str, str]:
    """Return the overrides of a sweep's job by key, without a leading +; empty for other runs."""
    folder = folder.resolve()
    if not is_sweep_folder(folder.parent):
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


def _join_run_names(names: Sequence[str]) -> str:
    """Join several names into one: a/0 and a/1 become a/0+1."""
    head, slash, first = names[0].rpartition("/")
    if all(name.rpartition("/")[0] == head for name in names):
        names = [f"{head}{slash}{first}", *(name.rpartition("/")[2] for name in names[1:])]
    return "+".join(names) if len(names) <= 4 else f"{names[0]}+... ({count_of(names, 'run')})"
