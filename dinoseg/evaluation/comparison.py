"""Evaluations of the same images held against the first of them: by class, by image, and with pictures."""

import csv
import io
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig
from tabulate import tabulate

from dinoseg.errors import UserError
from dinoseg.evaluation.class_scores import ClassScores, paired_differences, unit_sums
from dinoseg.evaluation.collected import image_mious
from dinoseg.evaluation.image_record import ImageRecord
from dinoseg.evaluation.paired_pictures import Pictures, most_different
from dinoseg.report.html.comparison import OtherRun
from dinoseg.storage.atomic import write_text
from dinoseg.wording import count_of, listed

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
            lines.append(f"{name}: {shown[0]} and {shown[1]}")
    missing = [
        sorted({*ours} - {*theirs}) for ours, theirs in ((first.images, other.images), (other.images, first.images))
    ]
    for names, where in zip(missing, ("first", "second"), strict=True):
        if names:
            lines.append(
                f"{count_of(names, 'image')} only in the {where} (data={first.data}, {other.data}): {listed(names)}"
            )
    return lines


def scores_of(record: ImageRecord) -> dict[str, float | None]:
    """Return all scores of a record by name; None where one is undefined."""
    kind = ClassScores(len(record.classes), record.background)
    found = kind.scores(record.counts.sum(axis=0).reshape(-1))
    return {key: float(value) if np.isfinite(value) else None for key, value in found.items()}


def against(
    cfg: DictConfig, folders: Sequence[Path], records: Sequence[ImageRecord], names: Sequence[str]
) -> list[OtherRun]:
    """Return each run but the first, held against that."""
    kind, first = ClassScores(len(records[0].classes), records[0].background), records[0]
    sums = [unit_sums(record.counts, first.units) for record in records]
    mious = [image_mious(record.counts) for record in records]
    found = []
    for number in range(1, len(records)):
        pictures = Pictures(cfg, first, (folders[0], folders[number]))
        shots, reason = most_different(pictures, mious[0], mious[number])
        found.append(
            OtherRun(
                name=names[number],
                scores=scores_of(records[number]),
                differences=paired_differences(kind, sums[0], sums[number]),
                mious=mious[number],
                shots=shots,
                no_pictures=reason,
            )
        )
    return found


def run_names(folders: Sequence[Path]) -> list[str]:
    """Return short names of run folders that tell them apart: their last parts, as many as it takes."""
    whole = [folder.resolve().parts for folder in folders]
    for count in range(1, max(map(len, whole)) + 1):
        names = ["/".join(parts[-count:]) for parts in whole]
        if len(set(names)) == len(names):
            break
    return names


def comparison_table(first: str, record: ImageRecord, others: Sequence[OtherRun]) -> str:
    """Return scores and differences as text, in percent and points."""
    rows = []
    scores = scores_of(record)
    for key, value in scores.items():
        row = [_label(key, record), _shown(value)]
        for other in others:
            gap = other.differences[key]
            limits = "-" if gap["ci95"] is None else " .. ".join(_shown(end, "+") for end in gap["ci95"])
            row += [_shown(other.scores[key]), _shown(gap["value"], "+"), limits]
        rows.append(row)
    heads = ["", f"{first} %"]
    for other in others:
        heads += [f"{other.name} %", "points", "95 % interval"]
    align = ("left", *["right"] * (len(heads) - 1))
    return tabulate(rows, headers=heads, disable_numparse=True, colalign=align)


def write_tables(out_dir: Path, first: str, record: ImageRecord, others: Sequence[OtherRun]) -> None:
    """Write compare.csv, a line for each score, and images.csv, one for each image; scores in 0..1."""
    scores, mious = scores_of(record), image_mious(record.counts)
    heads: list[Any] = ["score", first]
    for other in others:
        heads += [other.name, "difference", "low", "high"]
    lines = [heads]
    for key, value in scores.items():
        line = [_label(key, record), value]
        for other in others:
            gap = other.differences[key]
            line += [other.scores[key], gap["value"], *(gap["ci95"] or (None, None))]
        lines.append(line)
    _write_csv(out_dir / "compare.csv", lines)
    per_image = zip(record.images, record.units, mious, *(other.mious for other in others), strict=True)
    _write_csv(out_dir / "images.csv", [["image", "unit", first, *(other.name for other in others)], *per_image])


def _write_csv(path: Path, lines: Sequence[Sequence[Any]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(
        ["" if value is None else value for value in line] for line in lines
    )
    write_text(path, text.getvalue())


def _label(key: str, record: ImageRecord) -> str:
    kind, _, index = key.partition("/")
    return f"IoU {record.classes[int(index)]}" if index else kind


def _shown(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{100 * value:{sign}.2f}"
