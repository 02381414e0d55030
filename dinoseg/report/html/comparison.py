"""Report that compares evaluations of the same images: differences, their intervals, and example images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dinoseg.core.shapes import Palette
from dinoseg.core.sizes import evenly_spaced
from dinoseg.report.html.about import About, about_sections
from dinoseg.report.html.charts import Axes, around, line_chart, scatter_chart, thinned
from dinoseg.report.html.evaluation import interval_head
from dinoseg.report.html.page import Section, page, paragraph, percent, spanned, text, tiles
from dinoseg.report.html.pictures import BOTH_WRONG, RIGHT, WRONG, card, marked
from dinoseg.report.html.tables import Cell, class_cell, number_cell, plain_cell, table, whisker
from dinoseg.report.overlay import blend, legend_of
from dinoseg.report.scores import few_units
from dinoseg.report.table import MEANS
from dinoseg.report.verdicts import SURELY_BETTER, SURELY_WORSE
from dinoseg.utils.wording import count_of

_DOTS = 2000  # dots per chart: with more, a page takes seconds to open
_MARKS = {SURELY_BETTER: ("up", "\u25b2 "), SURELY_WORSE: ("down", "\u25bc ")}
_DECIDING = 6  # images named as decisive
WIDEST = 3  # other sides with interval columns; for more, compare.png shows the intervals


@dataclass(frozen=True)
class PairShot:
    """An image that two runs predict differently, downscaled.

    Args:
        name: name of the image.
        mious: mIoU of both runs.
        frame: (H, W, 3) uint8.
        reference: (H, W) uint8.
        predictions: (H, W) uint8 of both runs.
    """

    name: str
    mious: tuple[float, float]
    frame: np.ndarray
    reference: np.ndarray
    predictions: tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class OtherRun:
    """A run compared with the first run.

    Args:
        name: name of the run.
        scores: scores by name.
        differences: `value`, `ci95`, `p` and `verdict` by score name: this run minus the first.
        mious: mIoU of each image.
        decides: contribution of each image to the mIoU difference.
        shots: images with the greatest gain or loss.
        no_pictures: reason why there are no images; empty if there are some.
    """

    name: str
    scores: Mapping[str, float | None]
    differences: Mapping[str, Mapping[str, Any]]
    mious: Sequence[float | None]
    decides: Sequence[float | None]
    shots: Sequence[PairShot]
    no_pictures: str = ""


@dataclass(frozen=True)
class ComparisonReport:
    """Content of the page.

    Args:
        said: a line below the title.
        classes: class names.
        palette: one colour per class.
        ignore_index: id of unlabelled pixels.
        images: image names.
        units: number of resampled units.
        unit: name of a unit.
        intervals: note on the units of the intervals.
        seeds: note on other seeds.
        first: name of the first run.
        scores: scores of the first run, by name.
        mious: mIoU of each image in the first run.
        others: runs compared with the first.
        about: provenance of the comparison.
    """

    said: str
    classes: Sequence[str]
    palette: Palette
    ignore_index: int
    images: Sequence[str]
    units: int
    unit: str
    intervals: str
    seeds: str
    first: str
    scores: Mapping[str, float | None]
    mious: Sequence[float | None]
    others: Sequence[OtherRun]
    about: About


def comparison_page(report: ComparisonReport) -> str:
    """Return the page as HTML."""
    sections = [_scores(report), _classes(report)]
    for number, other in enumerate(report.others):
        end = f" ({other.name})" if len(report.others) > 1 else ""
        sections.append(Section(f"images-{number}", f"Image by image{end}", _by_image(report, other)))
        sections.append(Section(f"pictures-{number}", f"Largest differences{end}", _pictures(report, other)))
    sections += about_sections(report.about)
    names = [other.name for other in report.others]
    if len(names) > WIDEST:
        names = [count_of(names, "side")]
    title = " against ".join([*names, report.first])
    return page(title, report.said, sections, [few_units(report.units, report.unit)])


def _scores(report: ComparisonReport) -> Section:
    shown = [(report.first, f"{percent(report.scores['miou'])} %", "mIoU")]
    for other in report.others:
        gap = other.differences["miou"]
        shown.append((other.name, f"{percent(other.scores['miou'])} %", f"mIoU, points: {_gap(gap)}"))
    keys = [(key, name) for key, name in MEANS.items() if key in report.scores]
    rows = [[plain_cell(name), *_cells(report, key)] for key, name in keys]
    wide = len(report.others) > WIDEST
    note = paragraph(
        f"Differences in points: a run minus {report.first}, over the same {count_of(report.images, 'image')}; the "
        f"jackknife leaves out each {report.unit} in both.",
        f"95 % intervals (Student's t): {report.intervals}." + " compare.png has them all." * wide,
        "Significantly better is marked \u25b2, significantly worse \u25bc: p is below 0.05 after Holm's correction "
        "over all runs, and for classes also over the classes, so an interval may exclude 0 without a mark.",
        f"Seeds: {report.seeds}.",
    )
    return Section("scores", "Scores", tiles(shown) + table(_heads(report, "score"), rows, "Means") + note)


def _classes(report: ComparisonReport) -> Section:
    rows = [
        [class_cell(name, report.palette[index]), *_cells(report, f"iou/{index}")]
        for index, name in enumerate(report.classes)
    ]
    return Section("classes", "Classes", table(_heads(report, "class"), rows, "IoU by class (click a heading to sort)"))


def _heads(report: ComparisonReport, first: str) -> list[tuple[str, str]]:
    heads, over = [(first, "text"), (f"{report.first} %", "number")], interval_head(report.units, report.unit)
    for other in report.others:
        heads += [(f"{other.name} %", "number"), ("difference", "number")]
        heads += [(over, "text"), ("", "plain")] * (len(report.others) <= WIDEST)
    return heads


def _cells(report: ComparisonReport, key: str) -> list[Cell]:
    gaps = [other.differences[each] for other in report.others for each in other.differences]
    reach = max([abs(end) for gap in gaps for end in (gap["ci95"] or [gap["value"] or 0.0])] + [0.01])
    cells = [number_cell(report.scores[key], percent(report.scores[key]))]
    for other in report.others:
        gap = other.differences[key]
        value, limits = gap["value"], gap["ci95"]
        sure, mark = _MARKS.get(gap["verdict"], ("", ""))
        shown = "-" if value is None else f"{mark}{100 * value:+.1f}"
        cells += [
            number_cell(other.scores[key], percent(other.scores[key])),
            Cell(f'<span class="{sure}">{text(shown)}</span>', value),
        ]
        if len(report.others) <= WIDEST:
            cells += [plain_cell(spanned(limits, sign="+")), whisker(value, limits, (-reach, reach))]
    return cells


def _gap(gap: Mapping[str, Any]) -> str:
    if gap["value"] is None:
        return "-"
    limits = "" if gap["ci95"] is None else f" ({spanned(gap['ci95'], sign='+')})"
    return f"{100 * gap['value']:+.1f}{limits}, {gap['verdict']}"


def _by_image(report: ComparisonReport, other: OtherRun) -> str:
    pairs = [
        (100 * ours, 100 * theirs, name)
        for ours, theirs, name in zip(report.mious, other.mious, report.images, strict=True)
        if ours is not None and theirs is not None
    ]
    if not pairs:
        return paragraph("No image has a labelled pixel.")
    gaps = sorted(theirs - ours for ours, theirs, _ in pairs)
    counted = [sum(gap > 0 for gap in gaps), sum(gap < 0 for gap in gaps)]
    summary = paragraph(
        f"mIoU of an image, over the classes in its reference or the run's own prediction. {other.name} is better in "
        f"{counted[0]}, worse in {counted[1]} and equal in {len(gaps) - sum(counted)} of {count_of(gaps, 'image')}; "
        "all are in images.csv.",
        _deciding(report, other),
    )
    ends = around([value for pair in pairs for value in pair[:2]])
    pairs.sort(key=lambda pair: pair[1] - pair[0])
    drawn = evenly_spaced(len(pairs), _DOTS)
    title = "Each image" if len(drawn) == len(pairs) else f"{_DOTS} of the images, evenly spaced by difference"
    axes = Axes(ends, ends, f"{report.first}, %", f"{other.name}, %")
    scatter = scatter_chart(title, [pairs[index] for index in drawn], axes)
    places = thinned([(float(index), gap) for index, gap in enumerate(gaps, start=1)])
    axes = Axes((1, max(2, len(gaps))), around(gaps, zero=True), "images, sorted", "points")
    return (
        summary + f'<div class="charts">{scatter}{line_chart("Sorted differences", [(other.name, places)], axes)}</div>'
    )


def _deciding(report: ComparisonReport, other: OtherRun) -> str:
    """Return a sentence on the images that contribute most to the difference."""
    pairs = [(share, name) for share, name in zip(other.decides, report.images, strict=True) if share]
    pairs.sort(key=lambda pair: -abs(pair[0]))
    contributions = "; ".join(f"{name} {100 * share:+.2f}" for share, name in pairs[:_DECIDING])
    return f"Contribution of each image to the difference in mIoU, in points, largest first: {contributions}." * bool(
        contributions
    )


def _pictures(report: ComparisonReport, other: OtherRun) -> str:
    if other.no_pictures:
        return paragraph(other.no_pictures)
    key = paragraph(
        f"In the last image, blue: only {other.name} is correct; red: only {report.first} is correct; yellow: both are "
        "wrong."
    )
    return key + "".join(_shot(report, other, shot) for shot in other.shots)


def _shot(report: ComparisonReport, other: OtherRun, shot: PairShot) -> str:
    masks = {"reference": shot.reference, report.first: shot.predictions[0], other.name: shot.predictions[1]}
    tinted = [
        (caption, blend(shot.frame, mask, report.palette, ignore_index=report.ignore_index, opacity=0.6))
        for caption, mask in masks.items()
    ]
    labelled = shot.reference != report.ignore_index
    first, second = ((mask == shot.reference) & labelled for mask in shot.predictions)
    marks = [(second & ~first, RIGHT), (first & ~second, WRONG), (labelled & ~first & ~second, BOTH_WRONG)]
    before, after = shot.mious
    summary = f"mIoU {percent(before)} % and {percent(after)} %: {100 * (after - before):+.1f} points"
    legend = legend_of(list(masks.values()), report.classes, report.palette, ignore_index=report.ignore_index)
    panels = [("frame", shot.frame), *tinted, ("which is correct", marked(shot.frame, marks))]
    return card(shot.name, summary, panels, legend)
