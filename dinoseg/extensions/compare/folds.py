"""Folds of one side: each image is scored by the run that has not seen it, and the seeds of a fold are averaged."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from dinoseg.evaluation.image_record import ImageRecord
from dinoseg.evaluation.scoring.intervals import Estimate
from dinoseg.extensions.compare.alignment import align_records, compare_settings
from dinoseg.extensions.compare.pooled_scores import BuildMetrics, Fold, average_images, pool_scores
from dinoseg.utils import forms
from dinoseg.utils.errors import UserError
from dinoseg.utils.wording import count_of, join_names

logger = logging.getLogger(__name__)
_SPLIT = forms.table(forms.list_of(forms.text))  # form of split.json in the run folder of a training


@dataclass(frozen=True)
class PooledFolds:
    """Result of a side over the images of all of its folds.

    Args:
        record: of all images. Counts are means over the seeds of each fold, times the `scale` of `pool_folds`.
        places: by image, the folder of the evaluation whose prediction is shown.
        seeds: number of runs of each fold.
        without_seed: of each fold, the totals (S, 3 K or 4 K) of all images without each of its S seeds; empty if a
            fold has one seed.
        seeds_of_further: of each fold the errors of further metrics over its seeds, see `PooledScores`.
        left_out: names of scores that are not pooled.
    """

    record: ImageRecord
    places: Mapping[str, Path]
    seeds: Sequence[int]
    without_seed: Sequence[np.ndarray]
    seeds_of_further: Sequence[Mapping[str, Estimate]] = ()
    left_out: Sequence[str] = ()


def pool_folds(folds: Sequence[Fold], scale: int, build_metrics: BuildMetrics | None = None) -> PooledFolds:
    """Return the result of a side over the images of all of its folds.

    Args:
        folds: two or more.
        scale: multiple of each number of seeds, the same for all sides. It keeps mean counts whole, since a class that
            one group alone has must be left with exactly 0 pixels where that group is left out.
        build_metrics: builds the further metrics to pool; None: there are none.

    Raises:
        UserError: the folds differ in classes, the references of a fold's seeds differ, or an image is in two folds.
    """
    records = [align_records(fold) for fold in folds]
    first = records[0][0]
    places = [next(iter(fold)) for fold in folds]
    _check_folds(places, [seeds[0] for seeds in records])
    counts = [np.sum([record.counts for record in seeds], axis=0) * (scale // len(seeds)) for seeds in records]
    units = {seeds[0].unit for seeds in records}
    _warn_of_groups(places, [seeds[0] for seeds in records])
    all_units = [unit for seeds in records for unit in seeds[0].units]
    given = {name: None for fold in folds for record in fold.values() for name in record.scores}
    metrics = build_metrics(places[0], first.root) if given and build_metrics else []
    pooled = pool_scores(folds, all_units, metrics)
    record = replace(
        first,
        images=[name for seeds in records for name in seeds[0].images],
        units=all_units,
        unit=first.unit if len(units) == 1 else "group",
        counts=np.concatenate(counts),
        scores=pooled.scores,
        image_scores={
            name: [score for seeds in records for score in average_images([seed.image_scores[name] for seed in seeds])]
            for name in first.image_scores
            if name in pooled.scores
        },
    )
    return PooledFolds(
        record,
        {name: place for place, seeds in zip(places, records, strict=True) for name in seeds[0].images},
        [len(seeds) for seeds in records],
        _sum_without_seed(records, [each.sum(axis=0) for each in counts], scale),
        pooled.seeds,
        [name for name in given if name not in pooled.scores],
    )


def _check_folds(places: Sequence[Path], records: Sequence[ImageRecord]) -> None:
    """Refuse folds that differ in their settings or have an image in common."""
    for place, record in zip(places, records, strict=True):
        if differences := compare_settings(records[0], record):
            raise UserError(f"runs: folds {places[0]} and {place} cannot be pooled: {'; '.join(differences)}.")
    names = Counter(name for record in records for name in record.images)
    if twice := [name for name, count in names.items() if count > 1]:
        holders = [str(place) for place, record in zip(places, records, strict=True) if {*twice} & {*record.images}]
        raise UserError(
            f"runs: folds overlap: {join_names(holders)} were evaluated on the same {count_of(twice, 'image')} "
            f"({join_names(twice)}). Give runs of one division into folds: the same data.folds, data.group and data."
        )


def _warn_of_groups(places: Sequence[Path], records: Sequence[ImageRecord]) -> None:
    """Warn of folds whose units differ, and of groups whose images are in several folds."""
    units = [record.unit for record in records]
    if len({*units}) > 1:
        named = [f"{place} by {unit}" for place, unit in zip(places, units, strict=True)]
        logger.warning("The folds group their images differently (data.group): %s.", join_names(named))
    folds = Counter(unit for record in records for unit in {*record.units})
    if shared := [unit for unit, count in folds.items() if count > 1]:
        logger.warning(
            "%s of the side of %s with images in several folds: %s. Models are scored on groups of their training, so "
            "scores are too high. Set data.group in the training.",
            count_of(shared, "group"),
            places[0],
            join_names(shared),
        )


def check_unseen(records: Mapping[Path, ImageRecord]) -> None:
    """Refuse an evaluation on images that its model was trained on, as the run folder of the training lists them.

    Args:
        records: of trainings with a fold, by folder of the evaluation.

    Raises:
        UserError: names the evaluation and the images.
    """
    unknown = []
    for place, record in records.items():
        folders = place.parent, Path(record.source).parent.parent
        path = next((path for folder in folders if (path := folder / "split.json").is_file()), None)
        if path is None:
            unknown.append(str(place))
        elif seen := sorted({*record.images} & {*forms.read_json(path, _SPLIT)["train"]}):
            raise UserError(
                f"runs: {place} was evaluated on {count_of(seen, 'image')} of its own training ({join_names(seen)}): "
                f"its fold is not that of {path}. Evaluate it with the data.folds and data.group of the training."
            )
    if unknown:
        logger.warning(
            "There is no split.json of the trainings of %s: their images may be those of the training.",
            join_names(unknown),
        )


def _sum_without_seed(
    records: Sequence[Sequence[ImageRecord]], totals: Sequence[np.ndarray], scale: int
) -> list[np.ndarray]:
    """Return `PooledFolds.without_seed`, by sums alone.

    A difference of totals might leave a remainder of an absent class.
    """
    if min(map(len, records)) < 2:
        return []
    found = []
    for fold, seeds in enumerate(records):
        rest = sum(each for number, each in enumerate(totals) if number != fold)
        by_seed = np.stack([record.counts.sum(axis=0) for record in seeds])
        others = (by_seed.sum(axis=0) - by_seed) * scale / (len(seeds) - 1)
        found.append((rest + others).reshape(len(seeds), -1))
    return found
