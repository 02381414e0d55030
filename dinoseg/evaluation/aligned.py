"""Evaluations of the same images brought into one order; those of others are refused with what differs."""

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np

from dinoseg.evaluation.image_record import ImageRecord
from dinoseg.utils.errors import UserError
from dinoseg.utils.wording import count_of, listed

logger = logging.getLogger(__name__)


def aligned(records: dict[Path, ImageRecord]) -> list[ImageRecord]:
    """Return records whose images have one order, that of the first.

    Raises:
        UserError: they are of other images, classes or splits, naming what differs.
    """
    (folder, first), *others = records.items()
    found = [first]
    for where, other in others:
        differences = _differences(first, other)
        if not differences:
            place = {name: index for index, name in enumerate(other.images)}
            order = [place[name] for name in first.images]
            if [other.units[index] for index in order] != [*first.units]:
                logger.warning(
                    "%s says otherwise than %s what images belong to (data.group): intervals are over %s of the first.",
                    where,
                    folder,
                    count_of(len({*first.units}), first.unit),
                )
            other = replace(other, images=first.images, units=first.units, counts=other.counts[order])
            if not np.array_equal(other.counts[:, 1], first.counts[:, 1]):
                changed = np.flatnonzero((other.counts[:, 1] != first.counts[:, 1]).any(axis=1))
                names = listed([first.images[index] for index in changed.tolist()])
                differences = [f"the references of {count_of(len(changed), 'image')} differ: {names}"]
        if differences:
            said = "".join(f"\n- {line}" for line in differences)
            raise UserError(
                f"runs: {folder} and {where} are not of the same images, so they do not compare:{said}\n"
                "Evaluate both on the same data and split, with the same classes and sizes."
            )
        found.append(other)
    return found


def _differences(first: ImageRecord, other: ImageRecord) -> list[str]:
    """Return what keeps two records from being compared, a line each."""
    lines = []
    for name in ("classes", "ignore_index", "background", "split"):
        ours, theirs = getattr(first, name), getattr(other, name)
        if ours != theirs:
            shown = [listed(each) if isinstance(each, list) else str(each) for each in (ours, theirs)]
            lines.append(f"{name}: {shown[0]} in the first; {shown[1]} in the second")
    missing = [
        sorted({*ours} - {*theirs}) for ours, theirs in ((first.images, other.images), (other.images, first.images))
    ]
    for names, where in zip(missing, ("first", "second"), strict=True):
        if names:
            lines.append(
                f"{count_of(names, 'image')} only in the {where} (data={first.data}, {other.data}): {listed(names)}"
            )
    return lines
