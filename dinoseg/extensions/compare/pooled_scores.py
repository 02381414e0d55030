"""Scores of further metrics over the images of all folds, from the counts of each image in the run folders."""

import logging
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dinoseg.checkpoints.run_config import build_saved
from dinoseg.core.metric import Counts, RowMetric, plain_score
from dinoseg.evaluation.image_record import COUNTS, ImageRecord, refuse_damage
from dinoseg.evaluation.scoring.intervals import Estimate, UnitScore, mean_of
from dinoseg.evaluation.unit_scores import further_scores, leave_units_out
from dinoseg.experiment.builder import Builder
from dinoseg.utils.errors import UserError
from dinoseg.utils.files import open_regular
from dinoseg.utils.wording import count_of

logger = logging.getLogger(__name__)
Fold = Mapping[Path, ImageRecord]  # records of the seeds of a fold, by folder of the evaluation
BuildMetrics = Callable[[Path, str], Sequence[RowMetric]]  # of an evaluation, by its folder and that of its data


def build_metrics(builder: Builder, place: Path, root: str) -> Sequence[RowMetric]:
    """Return the metrics of an evaluation; none, with a warning, if they cannot be built.

    Args:
        builder: of the config composed from the command line.
        place: folder of the evaluation.
        root: folder of the data set, as the evaluation recorded it.
    """
    try:
        return build_saved(builder, place, root, lambda builder: builder.metrics, "metric")
    except UserError as error:
        logger.warning("%s", error)
        return []


class PooledScores(NamedTuple):
    """Scores of further metrics over all folds.

    Attributes:
        scores: by name, averaged over the seeds.
        seeds: of each fold the errors over its seeds by name; without a second seed of each fold, none.
    """

    scores: dict[str, UnitScore]
    seeds: list[dict[str, Estimate]]


def pool_scores(folds: Sequence[Fold], units: Sequence[str], metrics: Sequence[RowMetric]) -> PooledScores:
    """Return the scores of `metrics` over the images of all folds.

    The first seeds of all folds have a score together, so have the second ones, and so on, as many as each fold has.
    A score is left out if an evaluation has none of its name and of the metric's settings, or no counts of it.

    Args:
        folds: with the same images for all seeds of a fold.
        units: of each image, fold by fold, in the order of the first seeds.
        metrics: of the evaluations.

    Raises:
        UserError: counts are damaged, or do not give the recorded scores.
    """
    given = [record.scores for fold in folds for record in fold.values()]
    images = [next(iter(fold.values())).images for fold in folds]
    seeds = [*zip(*(fold.items() for fold in folds), strict=False)]
    found = PooledScores({}, [{} for _ in folds if len(seeds) > 1])
    for metric in metrics:
        settings = metric.settings
        shared = [
            name
            for name in metric.scores
            if all(name in scores and scores[name].settings == settings for scores in given)
        ]
        rows = [
            [
                _read_in_order(place, record, metric, shared, names)
                for (place, record), names in zip(seed, images, strict=True)
            ]
            for seed in seeds
        ]
        stored = {frozenset(row) for of_seed in rows for of_fold in of_seed for row in of_fold[:1] or [{}]}
        if not shared or not all(stored) or len(stored) > 1:
            continue
        by_seed = [further_scores(metric, leave_units_out(metric, [*chain(*of_seed)], units)) for of_seed in rows]
        found.scores.update({name: average_scores([scores[name] for scores in by_seed]) for name in shared})
        for fold, errors in enumerate(found.seeds):
            # seeds of one fold, with the first ones of the others: pairs in different folds have nothing in common
            varied = [
                metric.score_rows([*chain(*rows[0][:fold], of_seed[fold], *rows[0][fold + 1 :])]) for of_seed in rows
            ]
            errors.update({name: mean_of([float(scores[name]) for scores in varied]) for name in shared})
    return found


def _read_in_order(
    place: Path, record: ImageRecord, metric: RowMetric, scores: Sequence[str], images: Sequence[str]
) -> list[Counts]:
    """Return the counts of a metric for images of an evaluation; none if it stores none.

    Raises:
        UserError: they are damaged, or do not give the recorded `scores`.
    """
    with refuse_damage(place):
        rows = _read_rows(place, next(iter(metric.scores)))
        if len(rows) not in {0, len(record.images)}:
            raise ValueError(f"its counts are of {count_of(rows, 'image')}, and its record of {len(record.images)}")
        by_image = dict(zip(record.images, rows, strict=bool(rows)))
        found = metric.score_rows(rows) if rows else {}
        # counts of another evaluation would change scores silently
        for name in scores if rows else ():
            values = np.array([plain_score(found[name]), record.scores[name].value], np.float64)
            if not np.isclose(values[0], values[1], rtol=1e-9, equal_nan=True):
                raise ValueError(f"its counts give a {name} of {values[0]}, and its record has {values[1]}")
    return [by_image[name] for name in images if rows]


def _read_rows(folder: Path, score: str) -> list[Counts]:
    """Return the counts of a further metric for each image of the record in a folder; none if it stores none.

    Args:
        folder: of the record.
        score: the main score of the metric.
    """
    columns = {}
    with open_regular(folder / COUNTS) as file, np.load(file) as arrays:
        for key in [key for key in arrays.files if key.startswith(f"{score}/") and not key.endswith("/ends")]:
            ends = f"{key}/ends"
            values = arrays[key]
            columns[key.removeprefix(f"{score}/")] = np.split(values, arrays[ends][:-1]) if ends in arrays else values
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def average_scores(scores: Sequence[UnitScore]) -> UnitScore:
    """Return the mean of a score over several runs on the same units."""
    values = np.array([[score.value, *score.left_out] for score in scores], dtype=np.float64).mean(axis=0)
    scored = np.any(np.array([score.scored for score in scores], bool), axis=0)
    return UnitScore(float(values[0]), values[1:], scored, scores[0].better, scores[0].settings)


def average_images(scores: Sequence[Sequence[float | None]]) -> list[float | None]:
    """Return the score of each image, averaged over those runs where it is defined."""
    defined = [[score for score in of_image if score is not None] for of_image in zip(*scores, strict=True)]
    return [plain_score(np.mean(each)) if each else None for each in defined]
