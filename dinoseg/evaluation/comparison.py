"""Sides of a comparison held against the first of them: by class, by image, and with pictures."""

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig
from tabulate import tabulate

from dinoseg.evaluation.class_scores import ClassScores, unit_sums
from dinoseg.evaluation.collected import image_mious
from dinoseg.evaluation.image_record import ImageRecord
from dinoseg.evaluation.paired_pictures import Pictures, most_different
from dinoseg.evaluation.sides import Side
from dinoseg.evaluation.verdicts import deciding, differences, mean_scores
from dinoseg.report.html.comparison import WIDEST, OtherRun
from dinoseg.report.table import MEANS
from dinoseg.report.verdicts import SURELY_BETTER, SURELY_WORSE
from dinoseg.utils.csv_text import write_csv
from dinoseg.utils.errors import UserError
from dinoseg.utils.wording import one_line

_TOLD = 5  # images that decide
logger = logging.getLogger(__name__)


def scores_of(records: Sequence[ImageRecord]) -> dict[str, float | None]:
    """Return all scores of a side's records by name, averaged over them; None where one is undefined."""
    return mean_scores(_kind(records[0]), [record.counts for record in records])


def best_first(scores: Sequence[float | None]) -> list[int]:
    """Return the places of scores, the highest first, those that are undefined last; equal ones stay in order."""
    return sorted(range(len(scores)), key=lambda place: math.inf if (score := scores[place]) is None else -score)


def against(cfg: DictConfig, sides: Sequence[Side]) -> list[OtherRun]:
    """Return each side but the first, held against that."""
    kind, first = _kind(sides[0].records[0]), sides[0]
    counts = [[record.counts for record in side.records] for side in sides]
    sums = [[unit_sums(each, first.records[0].units) for each in side] for side in counts]
    mious = [mean_mious(side) for side in sides]
    found: list[OtherRun] = []
    refused: dict[str, None] = {}
    pictures = Pictures(cfg, first.records[0], first.places[0])
    for number, gaps in enumerate(differences(kind, sums), start=1):
        other = sides[number]
        try:
            shots, reason = most_different(pictures, other.places[0], mious[0], mious[number], len(sides) - 1)
        except UserError as error:
            shots, reason = [], f"No pictures: {error}"
            refused[str(error)] = None
        found.append(
            OtherRun(
                name=other.name,
                scores=scores_of(other.records),
                differences=gaps,
                mious=mious[number],
                decides=deciding(kind, counts[0], counts[number]),
                shots=shots,
                no_pictures=reason,
            )
        )
    for reason in refused:  # once, though it were the same for all
        logger.warning("The page has no pictures: %s", reason)
    return found


def mean_mious(side: Side) -> list[float | None]:
    """Return the mIoU of each image, averaged over a side's runs that have one."""
    by_image = zip(*(image_mious(record.counts) for record in side.records), strict=True)
    defined = [[miou for miou in of_image if miou is not None] for of_image in by_image]
    return [float(np.mean(each)) if each else None for each in defined]


def _kind(record: ImageRecord) -> ClassScores:
    return ClassScores(len(record.classes), record.background)


def verdicts(first: Side, images: Sequence[str], others: Sequence[OtherRun]) -> str:
    """Return what is to be said of the sides: by class and image, or of more than a few a line for each."""
    if len(others) > WIDEST:
        return sides_table(first, others)
    lines = verdict_lines(first.name, images, others)
    return "\n".join([comparison_table(first, others), "", *lines])


def sides_table(first: Side, others: Sequence[OtherRun]) -> str:
    """Return the mIoU of each side as text, best first, in percent and points, and of how many classes it is sure."""
    heads = ["", "mIoU %", "points", "95 % interval", "p", "verdict", "classes better", "worse"]
    own, keys = scores_of(first.records)["miou"], [key for key in score_labels(first) if key.startswith("iou/")]
    rows = [[first.name, _shown(own), *["-"] * 3, "the first", "", ""]]
    for other in others:
        gap, kinds = other.differences["miou"], [other.differences[key]["verdict"] for key in keys]
        limits = "-" if gap["ci95"] is None else _span(gap["ci95"])
        chance = "-" if gap["p"] is None else f"{gap['p']:.2g}"
        sure = [str(kinds.count(verdict)) for verdict in (SURELY_BETTER, SURELY_WORSE)]
        shown = [other.name, _shown(other.scores["miou"]), _shown(gap["value"], "+"), limits, chance, gap["verdict"]]
        rows.append([*shown, *sure])
    order = best_first([own, *(other.scores["miou"] for other in others)])
    align = ["left", *["right"] * 4, "left", "right", "right"]
    return tabulate([rows[place] for place in order], headers=heads, disable_numparse=True, colalign=align)


def verdict_lines(first: str, images: Sequence[str], others: Sequence[OtherRun]) -> list[str]:
    """Return for each other side whether its mIoU is another, how surely, and which images add most to that."""
    lines = []
    for other in others:
        gap = other.differences["miou"]
        limits = "no interval" if gap["ci95"] is None else f"95 % {_span(gap['ci95'])}, p {gap['p']:.2g}"
        lines.append(f"{other.name}: {gap['verdict']}, against {first}: mIoU {_shown(gap['value'], '+')} ({limits})")
        shares = [(share, name) for share, name in zip(other.decides, images, strict=True) if share]
        shares.sort(key=lambda pair: -abs(pair[0]))
        if shares:
            told = ", ".join(f"{one_line(name)} {_shown(share, '+')}" for share, name in shares[:_TOLD])
            lines.append(f"  of which the images that decide add: {told}")
    return lines


def comparison_table(first: Side, others: Sequence[OtherRun]) -> str:
    """Return scores and differences as text, in percent and points."""
    rows, labels = [], score_labels(first)
    for key, value in scores_of(first.records).items():
        row = [labels[key], _shown(value)]
        for other in others:
            gap = other.differences[key]
            limits = "-" if gap["ci95"] is None else _span(gap["ci95"])
            row += [_shown(other.scores[key]), _shown(gap["value"], "+"), limits, gap["verdict"]]
        rows.append(row)
    heads, align = ["", f"{first.name} %"], ["left", "right"]
    for other in others:
        heads += [f"{other.name} %", "points", "95 % interval", "verdict"]
        align += ["right", "right", "right", "left"]
    return tabulate(rows, headers=heads, disable_numparse=True, colalign=align)


def write_tables(out_dir: Path, first: Side, others: Sequence[OtherRun]) -> None:
    """Write compare.csv, a line for each score, and images.csv, one for each image; scores in 0..1."""
    record, labels = first.records[0], score_labels(first)
    heads: list[Any] = ["score", first.name]
    for other in others:
        heads += [other.name, "difference", "low", "high", "p", "verdict"]
    lines = [heads]
    for key, value in scores_of(first.records).items():
        line = [labels[key], value]
        for other in others:
            gap = other.differences[key]
            line += [other.scores[key], gap["value"], *(gap["ci95"] or (None, None)), gap["p"], gap["verdict"]]
        lines.append(line)
    write_csv(out_dir / "compare.csv", lines)
    columns = [part for other in others for part in (other.mious, other.decides)]
    names = [name for other in others for name in (other.name, f"{other.name} adds")]
    per_image = zip(record.images, record.units, mean_mious(first), *columns, strict=True)
    write_csv(out_dir / "images.csv", [["image", "unit", first.name, *names], *per_image])


def score_labels(side: Side) -> Mapping[str, str]:
    """Return how each score is called, by its name."""
    record = side.records[0]
    means = {key: MEANS[key] for key in _kind(record).means}
    return means | {f"iou/{index}": f"IoU {name}" for index, name in enumerate(record.classes)}


def _span(limits: Sequence[float]) -> str:
    return " .. ".join(_shown(end, "+") for end in limits)


def _shown(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{100 * value:{sign}.2f}"
