"""Sides of a comparison: each is one run, or several runs that differ only in their seed or fold."""

import logging
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from math import lcm
from pathlib import Path
from typing import Any, NamedTuple

from dinoseg.checkpoints import run_config
from dinoseg.evaluation.image_record import RECORD, ImageRecord, find_evaluation, read_record
from dinoseg.evaluation.run_facts import EVALUATION
from dinoseg.extensions.compare.alignment import align_records
from dinoseg.extensions.compare.folds import PooledFolds, check_unseen, pool_folds
from dinoseg.extensions.compare.pooled_scores import BuildMetrics, Fold
from dinoseg.extensions.compare.side_names import side_names
from dinoseg.training.description import resolve_evaluate
from dinoseg.utils.errors import UserError
from dinoseg.utils.files import entries, is_sweep_folder
from dinoseg.utils.wording import count_of, format_override, join_names

MAX, _MAX_RUNS = 32, 160  # sides (each has images in the page) and runs
logger = logging.getLogger(__name__)


PATIENCE = "trainer.patience"
WEIGHTS = "weights"  # key of a recipe: best, or last, which no score of their validation images has selected


class EvaluatedModels(NamedTuple):
    """The trained models of an evaluation: one, or those of an ensemble.

    Attributes:
        models: number of them.
        out_of_fold: whether each image is predicted by those of its fold.
    """

    models: int
    out_of_fold: bool

    def describe(self) -> str:
        """Return the number, and who predicts an image."""
        return f"{self.models} models, {'each image by those of its fold' if self.out_of_fold else 'averaged'}"


class Recipe(NamedTuple):
    """Settings of an evaluated model by key, its seed, and the fold that it is scored on; None without folds."""

    keys: Mapping[str, Any]
    seed: Any
    fold: int | None = None


@dataclass(frozen=True)
class Side:
    """Runs of one recipe.

    Args:
        name: unique name of the side.
        folders: run folders.
        names: names of the runs.
        places: folders of the evaluations.
        records: records of the runs; without folds, with the images in the same order for all sides.
        recipes: recipes of the runs; None if unknown.
        pooled: result over all folds, with the images in the same order for all sides; None without folds.
    """

    name: str
    folders: Sequence[Path]
    names: Sequence[str]
    places: Sequence[Path]
    records: Sequence[ImageRecord]
    recipes: Sequence[Recipe | None] = ()
    pooled: PooledFolds | None = None

    @property
    def scored(self) -> Sequence[ImageRecord]:
        """Return the records of all images: of each run, or one that pools the folds."""
        return self.records if self.pooled is None else [self.pooled.record]

    @property
    def chosen_here(self) -> bool:
        """Return whether thresholds were chosen on the images that score them."""
        return any(record.chosen_here for record in self.records)

    @property
    def seeds(self) -> int:
        """Return the number of runs that predicted an image, in the fold with the fewest."""
        return len(self.folders) if self.pooled is None else min(self.pooled.seeds)

    def place_of(self, image: str) -> Path:
        """Return the folder of the evaluation whose prediction of an image is shown."""
        return self.places[0] if self.pooled is None else self.pooled.places[image]


def sides_of(runs: Any, build_metrics: BuildMetrics | None = None) -> list[Side]:
    """Return the sides in `runs`: nested lists are sides; without any, runs are grouped over seeds and folds.

    Args:
        runs: folders of runs and sweeps, and lists of these; or one folder.
        build_metrics: builds the further metrics that folds pool; None: there are none.

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
    read = _read_runs(folders)
    if all(len(side) == 1 for side in given):
        sides = group_runs(read.recipes)
    else:
        starts = [sum(map(len, given[:number])) for number in range(len(given))]
        sides = [[*range(start, start + len(side))] for start, side in zip(starts, given, strict=True)]
    if not 2 <= len(sides) <= MAX:
        raise _refusal(runs, f"makes {count_of(sides, 'side')}")
    return divide_runs(read, sides, build_metrics)


def read_side(folders: Sequence[Path], build_metrics: BuildMetrics | None = None) -> Side:
    """Return the side of runs of one recipe.

    Args:
        folders: run folders.
        build_metrics: builds the further metrics that folds pool; None: there are none.

    Raises:
        UserError: they have no evaluation of images, or cannot be pooled or averaged.
    """
    return divide_runs(_read_runs(folders), [[*range(len(folders))]], build_metrics)[0]


def _read_runs(folders: Sequence[Path]) -> Side:
    """Return all runs as one side without a name."""
    places = [find_evaluation(folder) for folder in folders]
    records = [read_record(place) for place in places]
    names = side_names(folders, [[number] for number in range(len(folders))])
    return Side("", folders, names, places, records, read_recipes(places, records))


def read_recipes(places: Sequence[Path], records: Sequence[ImageRecord]) -> list[Recipe | None]:
    """Return the recipe of each evaluation; None without a readable config.

    For a head without slots, mode=eval composes the group `slots`, but a training does not: it is then left out.
    """
    found: list[Recipe | None] = []
    recipes = run_config.recipes(places)
    has_slots = all(any(_is_of_slots(key) for key in recipe[0]) for recipe in recipes if recipe)
    for recipe, record in zip(recipes, records, strict=True):
        if recipe is None:
            found.append(None)
            continue
        # mode=eval stores groups of which it reads nothing as empty tables
        keys = {key: value for key, value in recipe[0].items() if value != {} and (has_slots or not _is_of_slots(key))}
        seed = recipe[1]
        fold = keys.get("data.fold")
        weights = resolve_evaluate(keys.pop("trainer.evaluate", None), fold)
        keys[WEIGHTS] = "last" if Path(record.source).stem == "last" else weights
        # models of all folds predict the same test images
        found.append(Recipe(keys, seed, None if record.split == "test" else keys.pop("data.fold", None)))
    return found


def _is_of_slots(key: str) -> bool:
    return key.removeprefix("choices.").split(".")[0] == "slots"


def read_ensemble(place: Path) -> EvaluatedModels:
    """Return the models of an evaluation by its config; one without a readable config."""
    try:
        config = run_config.read_config(run_config.config_file(place))
        ensemble = config["mode"].get("ensemble") or {}
        return EvaluatedModels(1 + len(config.get("members") or ()), ensemble.get("out_of_fold") is True)
    except (AttributeError, UserError, *run_config.BROKEN):
        return EvaluatedModels(1, False)


def divide_runs(runs: Side, groups: Sequence[Sequence[int]], build_metrics: BuildMetrics | None = None) -> list[Side]:
    """Return a side for each group of indices of runs, all with the same images in the same order.

    Raises:
        UserError: they were evaluated on other images, a run was trained on an image of its own fold, or the folds of a
            side cannot be pooled.
    """
    sides = [
        Side(
            name,
            [runs.folders[number] for number in group],
            [runs.names[number] for number in group],
            [runs.places[number] for number in group],
            [runs.records[number] for number in group],
            [runs.recipes[number] for number in group],
        )
        for name, group in zip(side_names(runs.folders, groups), groups, strict=True)
    ]
    for side in sides:
        _warn_of_others(side)
        _warn_of_repeated(side)
    folds = [_group_folds(side) for side in sides]
    scored = {place: record for of_side in folds for fold in of_side for place, record in fold.items()}
    for side in sides:  # a side of one fold, too: its evaluation may be of another fold than its training
        for place, record, recipe in zip(side.places, side.records, side.recipes, strict=True):
            if recipe and recipe.fold is not None and record.split != "train":
                scored[place] = record
    check_unseen(scored)
    return _align_sides(_pool_sides(sides, folds, build_metrics) if any(folds) else sides)


def _pool_sides(
    sides: Sequence[Side], folds: Sequence[Sequence[Fold]], build_metrics: BuildMetrics | None
) -> list[Side]:
    """Return the sides with the result over the `folds` of each, if it has several."""
    _warn_of_lacking_folds(sides)
    scale = lcm(*(len(fold) for of_side in folds for fold in of_side))
    found = []
    for side, of_side in zip(sides, folds, strict=True):
        if of_side:
            found.append(replace(side, pooled=pool_folds(of_side, scale, build_metrics)))
        else:
            records = [replace(record, counts=record.counts * scale) for record in side.records]
            found.append(replace(side, records=records))
    return found


def _align_sides(sides: Sequence[Side]) -> list[Side]:
    """Return the sides with the images that are scored in one order."""
    given: dict[Any, ImageRecord] = {}  # by run folder, or name of a side
    for side in sides:
        if side.pooled is None:
            given |= dict(zip(side.folders, side.records, strict=True))
        else:
            given[f"{side.name} ({count_of(side.pooled.seeds, 'fold')})"] = side.pooled.record
    aligned = iter(align_records(given))
    return [
        replace(side, records=[next(aligned) for _ in side.records])
        if side.pooled is None
        else replace(side, pooled=replace(side.pooled, record=next(aligned)))
        for side in sides
    ]


def _group_folds(side: Side) -> list[Fold]:
    """Return the records of each fold of a side; empty if its runs are of one fold, or without folds."""
    folds: dict[int | None, dict[Path, ImageRecord]] = {}
    for place, record, recipe in zip(side.places, side.records, side.recipes, strict=True):
        folds.setdefault(recipe.fold if recipe else None, {})[place] = record
    return [*folds.values()] if len(folds) > 1 else []


def describe_units(sides: Sequence[Side]) -> str:
    """Return a note on the units of the intervals."""
    record = sides[0].scored[0]
    units = record.count_units()
    if units > 1:
        return f"over {count_of(units, record.unit)}"
    if not _has_intervals(sides):
        return (
            f"none: they need two {record.unit}s, or several seeds of each side. For other groups, evaluate each run "
            "again with mode=eval resume=RUN data.group=PATTERN"
        )
    single = [side.name for side in sides if side.seeds == 1]
    note = f"over seeds only: there is one {record.unit}, so they do not generalise to others"
    return f"{note}; not for {join_names(single)}, one run each" if single else note


def describe_seeds(sides: Sequence[Side]) -> str:
    """Return a note on whether the verdicts account for other seeds."""
    single = [side.name for side in sides if side.seeds == 1]
    if len(single) == len(sides):
        part = "side" if all(side.pooled is None for side in sides) else "fold"
        ensembles = [(side.name, read_ensemble(place)) for side in sides for place in side.places[:1]]
        models = [f"{name}: {each.describe()}" for name, each in ensembles if each.models > 1]
        which = "; ".join(models) if models else f"one trained model per {part}"
        return f"{which}: verdicts hold for these models, not for other seeds"
    runs = ", ".join(str(side.seeds) for side in sides)
    if not _has_intervals(sides):
        return f"no difference has an interval, so none includes the variance over seeds ({runs} runs)"
    counted = f"the variance over seeds is included in the intervals ({runs} runs)"
    return f"{counted}, except for {join_names(single)}, one trained model each" if single else counted


def describe_folds(sides: Sequence[Side]) -> str:
    """Return a note on what the folds of sides share, and on their weights; empty without folds."""
    pooled = [side for side in sides if side.pooled is not None]
    if not pooled:
        return ""
    best = [side.name for side in pooled if any(each and each.keys[WEIGHTS] == "best" for each in side.recipes)]
    weights = (
        f"the best ones of {join_names(best)} were chosen on the images that score them, so these scores are too high. "
        "For the last: mode=eval resume=RUN/checkpoints/last.safetensors"
        if best
        else "the last"
    )
    stopped = [side.name for side in pooled if any(each and each.keys.get(PATIENCE) for each in side.recipes)]
    if stopped:
        weights += (
            f". trainer.patience may have stopped trainings of {join_names(stopped)} by scores of these images, which "
            "may then be too high"
        )
    elif not best and not any(side.chosen_here for side in pooled):
        weights += ", which no score of these images has chosen"
    folds = ", ".join(str(len(side.pooled.seeds)) for side in pooled if side.pooled)
    return (
        f"each image is scored by the run of its fold ({folds} folds). Weights: {weights}. Folds share training "
        "images: intervals hold for these models, not for other training images"
    )


def describe_left_out(names: Sequence[str]) -> str:
    """Return a note on scores that are not pooled over folds, and how to pool them."""
    return (
        "Scores that cannot be pooled over folds, since run folders lack counts of them, or the metric's settings "
        f"differ, are left out: {join_names(names)}. To pool those of one recipe, give its run of each fold: python -m "
        "dinoseg mode=eval 'resume=[RUN,RUN]' mode.split=val mode.ensemble.out_of_fold=true"
    )


def _has_intervals(sides: Sequence[Side]) -> bool:
    """Return whether there are several units, or several seeds of the first side and of another."""
    first, *others = [side.seeds for side in sides]
    return sides[0].scored[0].count_units() > 1 or min(first, max(others)) > 1


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
    found = [job for job in jobs if has_record(job)]
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


def has_record(run: Path) -> bool:
    """Return whether a run folder holds an evaluation of images."""
    return any((place / RECORD).is_file() for place in (run, run / EVALUATION))


def _refusal(runs: Any, found: str) -> UserError:
    return UserError(
        f"runs={format_override(runs)} {found}. Give at least two run folders of mode=eval or mode=train, such as "
        "runs=[outputs/a/eval_1,outputs/b/eval_1]; several seeds or folds of each as runs=[[a1,a2,a3],[b1,b2,b3]]; or "
        f"the folder of a sweep. At most {MAX} sides and {_MAX_RUNS} runs can be compared."
    )


def group_runs(recipes: Sequence[Recipe | None]) -> list[list[int]]:
    """Group the indices of runs that differ only in seed and fold; if all of them do, each seed is a side."""
    sides: list[list[int]] = []
    for number, recipe in enumerate(recipes):
        alike = [side for side in sides if recipe and (first := recipes[side[0]]) and first.keys == recipe.keys]
        if alike:
            alike[0].append(number)
        else:
            sides.append([number])
    if len(sides) == 1:
        logger.info("The runs differ only in their seed or fold: each seed is a side.")
        by_seed: dict[Any, list[int]] = {}
        for number, recipe in enumerate(recipes):
            seed = number if recipe is None or recipe.fold is None else f"seed {recipe.seed}"
            by_seed.setdefault(seed, []).append(number)
        sides = [*by_seed.values()]
    # runs of equal seed and fold are not repetitions: compare what differs instead
    cells = [[(str(recipe.seed), recipe.fold) for number in side if (recipe := recipes[number])] for side in sides]
    return sorted(
        part
        for side, each in zip(sides, cells, strict=True)
        for part in ([side] if len({*each}) == len(each) else [[number] for number in side])
    )


def _warn_of_others(side: Side) -> None:
    """Warn of a side whose runs differ in more than seed and fold."""
    if differing := _differing_keys([recipe for recipe in side.recipes if recipe]):
        logger.warning(
            "%s are one side, but differ in more than seed and fold: %s. The scores of the side mix these settings, "
            "and their effect counts as seed variance.",
            join_names(side.names),
            join_names(differing),
        )


def _warn_of_repeated(side: Side) -> None:
    """Warn of runs of a side that have one recipe, seed and fold: they are no independent runs."""
    alike: dict[str, list[str]] = {}
    for name, recipe in zip(side.names, side.recipes, strict=True):
        if recipe:
            alike.setdefault(repr((sorted(recipe.keys.items()), recipe.seed, recipe.fold)), []).append(name)
    for names in alike.values():
        if len(names) > 1:
            logger.warning(
                "%s are one side, but have the same settings, seed and fold: intervals count them as independent runs, "
                "and may be too narrow. Name one of them.",
                join_names(names),
            )


def _warn_of_lacking_folds(sides: Sequence[Side]) -> None:
    """Warn of each side that lacks folds, and of the settings in which runs of these folds in such sides differ."""
    lacking: dict[str, tuple[Recipe, set[int]]] = {}
    for side in sides:
        known = [recipe for recipe in side.recipes if recipe]
        count = known[0].keys.get("data.folds") if known else None
        if isinstance(count, int) and (folds := {*range(count)} - {recipe.fold for recipe in known}):
            lacking[side.name] = known[0], folds
    for name, (recipe, folds) in lacking.items():
        # a side with all folds is complete, so that none of its runs belongs to this side
        runs = [other for side in sides if side.name in lacking for other in side.recipes]
        differences = [_differing_keys([recipe, other]) for other in runs if other and other.fold in folds]
        others = [keys for keys in differences if keys]
        logger.warning(
            "%s has no run of fold %s.%s",
            name,
            join_names([str(fold) for fold in sorted(folds)]),
            f" Runs of other folds differ in {join_names(min(others, key=len))}." if others else "",
        )


def _differing_keys(recipes: Sequence[Recipe]) -> list[str]:
    keys = dict.fromkeys(key for recipe in recipes for key in recipe.keys)
    return [key for key in keys if any(recipe.keys.get(key) != recipes[0].keys.get(key) for recipe in recipes)]


def rename_sides(sides: Sequence[Side], names: Sequence[str]) -> list[Side]:
    """Return the sides with the names that the user gives, in their order.

    Raises:
        UserError: there are more or fewer names than sides, or two are equal.
    """
    if len(names) != len(sides) or len({*map(str, names)}) != len(sides):
        raise UserError(
            f"mode.names={format_override([*names])}: give a different name for each side, in this order: "
            f"{', '.join(side.name for side in sides)}."
        )
    return [replace(side, name=str(name)) for side, name in zip(sides, names, strict=True)]
