"""Evaluations of the same images, with their images in the same order."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from dinoseg.evaluation.image_record import ImageRecord
from dinoseg.evaluation.scoring.intervals import UnitScore
from dinoseg.utils.errors import UserError
from dinoseg.utils.wording import count_of, join_names

logger = logging.getLogger(__name__)


def align_records(records: Mapping[Any, ImageRecord]) -> list[ImageRecord]:
    """Return the records with their images in the order of the first record.

    Args:
        records: by folder, or by the name of a side whose folds are pooled.

    Raises:
        UserError: tasks, images, references, classes or splits differ (names the differences).
    """
    (folder, first), *others = records.items()
    found = [first]
    for where, other in others:
        differences = compare_settings(first, other) + _compare_images(first, other)
        if not differences:
            positions = {name: index for index, name in enumerate(other.images)}
            order = [positions[name] for name in first.images]
            scores: Mapping[str, UnitScore] = {}
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
            by_image = {name: [values[index] for index in order] for name, values in other.image_scores.items()}
            other = replace(
                other,
                images=first.images,
                units=first.units,
                counts=other.counts[order],
                scores=scores,
                image_scores=by_image,
            )
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
    settings = [{name: score.settings for name, score in record.scores.items()} for record in found]
    shared = [name for name, own in settings[0].items() if all(other.get(name) == own for other in settings)]
    if lost := sorted({name for record in found for name in record.scores} - {*shared}):
        logger.warning(
            "Not all runs have these scores, with the same settings, so they are left out: %s.", ", ".join(lost)
        )
    return [replace(record, scores={name: record.scores[name] for name in shared}) for record in found]


def compare_settings(first: ImageRecord, other: ImageRecord) -> list[str]:
    """Return the settings in which two records cannot be compared, one line each."""
    lines = []
    for name in ("task", "classes", "ignore_index", "background", "split"):
        ours, theirs = getattr(first, name), getattr(other, name)
        if ours != theirs:
            texts = [join_names(each) if isinstance(each, list) else str(each) for each in (ours, theirs)]
            lines.append(f"{name}: {texts[0]} in the first; {texts[1]} in the second")
    return lines


def _compare_images(first: ImageRecord, other: ImageRecord) -> list[str]:
    """Return a line for each of two records with images that the other one lacks."""
    missing = [
        sorted({*ours} - {*theirs}) for ours, theirs in ((first.images, other.images), (other.images, first.images))
    ]
    return [
        f"{count_of(names, 'image')} only in the {where} (data={first.data}, {other.data}): {join_names(names)}"
        for names, where in zip(missing, ("first", "second"), strict=True)
        if names
    ]
