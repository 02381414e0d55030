"""Report of an image evaluation: scores, errors, calibration and provenance."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dinoseg.core.shapes import Palette
from dinoseg.report.html.about import About, about_sections, training_section
from dinoseg.report.html.charts import Axes, around, bar_chart, line_chart, thinned
from dinoseg.report.html.page import Section, page, paragraph, percent, spanned, text, tiles, values
from dinoseg.report.html.pictures import Shot, data_uri, prediction_card
from dinoseg.report.html.tables import class_cell, number_cell, plain_cell, table, whisker
from dinoseg.report.scores import few_units
from dinoseg.report.table import MEANS
from dinoseg.utils.wording import count_of

_BARS = 20
_VIDEOS = 24  # videos with a curve
_NOTES = {
    "miou": "mean over the classes present",
    "miou_no_background": "mean over the other classes present",
    "dice": "mean over the classes present",
    "accuracy": "share of the labelled pixels",
}


MAX = 150  # maximum classes: those with the most pixels in the reference
_MAX_NUMBERS = 20  # classes up to which the cells carry numbers
_LONGEST_NAME = 24
_MIN_SHARE = 0.001  # minimum share with a number
_FULL = 0.3  # share above which the number is light
_BLUE = (31, 95, 191)
_EMPTY = (128, 128, 128, 40)  # a row without pixels
_MIN_BIN = 20  # minimum pixels of a bin in the chart


@dataclass(frozen=True)
class EvaluationReport:
    """Content of the page.

    Args:
        title: plain text.
        subtitle: a line below the title.
        classes: class names.
        palette: one colour per class.
        ignore_index: id of unlabelled pixels.
        scores: result of `ConfusionMatrix.compute`.
        intervals: 95 % interval by score name, and `iou/ID` of each class; None without an interval.
        unit: resampling unit of the intervals: `image`, or a group of images such as `video`.
        names: image names.
        groups: the unit of each image.
        mious: mIoU of each image; None without labelled pixels.
        distances: upper ends of the bands around boundaries, in pixels.
        boundary: (bands, 2) labelled and wrong pixels.
        calibration: see `calibration_section`; None without one.
        best: best images, best first.
        worst: worst images, worst first.
        official: result of `scoring.summary`; None without a protocol.
        about: provenance of the evaluation.
        training: rows of the training's metrics.jsonl; None without these.
    """

    title: str
    subtitle: str
    classes: Sequence[str]
    palette: Palette
    ignore_index: int
    scores: Mapping[str, Any]
    intervals: Mapping[str, list[float] | None]
    unit: str
    names: Sequence[str]
    groups: Sequence[str]
    mious: Sequence[float | None]
    distances: Sequence[int]
    boundary: np.ndarray
    calibration: Mapping[str, Any] | None
    best: Sequence[Shot]
    worst: Sequence[Shot]
    about: About
    official: Mapping[str, Any] | None = None
    training: Sequence[Mapping[str, Any]] | None = field(default=None)


def evaluation_page(report: EvaluationReport) -> str:
    """Return the page as HTML."""
    sections = [
        _scores(report),
        _classes(report),
        Section("confusion", "Confusion", _confusion(report)),
        _images(report),
        _pictures(report),
        _boundary(report),
        *_videos(report),
        Section("calibration", "Calibration", calibration_section(report.calibration)),
        training_section(report.training),
        *about_sections(report.about),
    ]
    return page(report.title, report.subtitle, sections, _warnings(report))


def interval_head(units: int, unit: str) -> str:
    """Return the heading of a column of intervals over units."""
    halves = ("95 % interval", f"over {count_of(units, unit)}")
    return " ".join(half.replace(" ", "\u00a0") for half in halves)  # wraps only between the halves


def interval_note(units: int, unit: str) -> str:
    """Return a note on the intervals over units."""
    over = count_of(units, unit)
    if units < 2:
        return f"No intervals: they need at least two {unit}s; there is {over}."
    return f"95 % intervals: Student's t over {over}, by leave-one-out jackknife."


def _warnings(report: EvaluationReport) -> list[str]:
    unscored = "" if report.scores["pixels"] else "No pixel of the reference is labelled, so nothing is scored."
    return [few_units(len(set(report.groups)), report.unit), unscored]


def _scores(report: EvaluationReport) -> Section:
    shown = [
        (name, f"{percent(report.scores[key])} %", _between(report.intervals.get(key)) or _NOTES[key])
        for key, name in MEANS.items()
        if key in report.scores
    ]
    present, pixels = report.scores["present_classes"], report.scores["pixels"]
    body = tiles(shown) + paragraph(
        f"{present} of {count_of(report.classes, 'class', 'classes')} present, in {pixels:,} labelled pixels of "
        f"{count_of(report.names, 'image')}.",
        interval_note(len(set(report.groups)), report.unit),
    )
    return Section("scores", "Scores", body + (official_table(report.official) if report.official else ""))


def official_table(official: Mapping[str, Any]) -> str:
    """Return the scores of a benchmark's own protocol, from `scoring.summary`."""
    rows = [
        [plain_cell(key), number_cell(value, percent(value, 2)), plain_cell(spanned(official["ci95"][key], 2))]
        for key, value in official["scores"].items()
    ]
    over = interval_head(official["n"], official["unit"])
    return table(
        [(official["protocol"], "text"), ("%", "number"), (over, "text")], rows, "The benchmark's own protocol"
    )


def _between(limits: Sequence[float] | None) -> str:
    return "" if limits is None else f"95 %: {spanned(limits)}"


def _classes(report: EvaluationReport) -> Section:
    over = interval_head(len(set(report.groups)), report.unit)
    heads = [("class", "text"), ("IoU %", "number"), (over, "text"), ("", "plain"), ("Dice %", "number")]
    heads += [("recall %", "number"), ("precision %", "number"), ("pixels", "number"), ("share %", "number")]
    rows, whole = [], max(report.scores["pixels"], 1)
    for row in report.scores["classes"]:
        index, limits = row["id"], report.intervals.get(f"iou/{row['id']}")
        shares = [number_cell(row[key], percent(row[key])) for key in ("dice", "recall", "precision")]
        iou = number_cell(row["iou"], "absent" if row["iou"] is None else percent(row["iou"]))
        pixels = row["pixels"]
        rows.append(
            [
                class_cell(report.classes[index], report.palette[index]),
                *(iou, plain_cell(spanned(limits)), whisker(row["iou"], limits), *shares),
                *(number_cell(pixels, f"{pixels:,}"), number_cell(pixels / whole, percent(pixels / whole, 2))),
            ]
        )
    note = paragraph("Absent: neither the reference nor the prediction holds the class; it is excluded from means.")
    return Section("classes", "Classes", table(heads, rows, "Scores by class (click a heading to sort)") + note)


def _confusion(report: EvaluationReport) -> str:
    note = paragraph(
        "A row is a class of the reference, a column a predicted one. Numbers are percent of the row; colour scales "
        "with the square root of the share, so that rare confusions are visible. Grey rows have no pixels."
    )
    return note + heat_map(np.asarray(report.scores["matrix"], dtype=np.int64), report.classes)


def _images(report: EvaluationReport) -> Section:
    defined = [score for score in report.mious if score is not None]
    counts, edges = np.histogram([100 * score for score in defined], bins=_BARS, range=(0, 100))
    axes = Axes((0, 100), (0, max(1.0, 1.05 * counts.max())), "mIoU of the image, %", "images")
    missing = len(report.mious) - len(defined)
    lines = ["The mIoU of an image is the mean IoU over the classes in its reference or its prediction."]
    if missing:
        lines.append(f"{count_of(missing, 'image')} without a labelled pixel have none.")
    if defined:
        lines.append(f"Median {percent(float(np.median(defined)))} %; all of them are in images.csv.")
    body = paragraph(*lines) + bar_chart("Images by mIoU", edges.tolist(), counts.tolist(), axes)
    return Section("images", "Images", body)


def _pictures(report: EvaluationReport) -> Section:
    parts = []
    for name, shots in (("Worst images", report.worst), ("Best images", report.best)):
        cards = [
            prediction_card(
                shot,
                report.names[shot.index],
                classes=report.classes,
                palette=report.palette,
                ignore_index=report.ignore_index,
            )
            for shot in shots
        ]
        parts.append((f"<h3>{name}</h3>" if cards else "") + "".join(cards))
    return Section("pictures", "Worst and best", "".join(parts) or paragraph("None: no image has a labelled pixel."))


def _boundary(report: EvaluationReport) -> Section:
    pixels, wrong = report.boundary.sum(axis=0) if len(report.boundary) else (0, 0)
    within = np.cumsum(report.boundary, axis=0)
    names = [f"within {end} px" for end in report.distances] + ["anywhere"]
    rows = []
    for name, (near, errors), band in zip(names, within, report.boundary, strict=True):
        shares = [
            errors / wrong if wrong else None,
            near / pixels if pixels else None,
            band[1] / band[0] if band[0] else None,
        ]
        rows.append([plain_cell(name), *(number_cell(share, percent(share)) for share in shares)])
    heads = [("distance to a reference boundary", "text"), ("of all errors %", "number"), ("of all pixels %", "number")]
    heads.append(("wrong in this band %", "number"))
    note = paragraph(
        "A boundary pixel is a labelled pixel that shares an edge with a pixel of another class. Within k pixels: less "
        "than k pixels (between centres) from a boundary pixel, so boundary pixels are within 1. The last column "
        "counts a pixel in its nearest band only. Errors near boundaries are outline errors; errors far from them are "
        "recognition errors."
    )
    return Section("boundary", "Errors at boundaries", note + table(heads, rows))


def _videos(report: EvaluationReport) -> list[Section]:
    """Return the curve of each video, worst first; empty if the images are not grouped."""
    groups: dict[str, list[float | None]] = {}
    for group, score in zip(report.groups, report.mious, strict=True):
        groups.setdefault(group, []).append(score)
    if len(groups) == len(report.groups):
        return []
    return [video_curves(groups, "mIoU %", report.unit)]


def video_curves(videos: Mapping[str, Sequence[float | None]], name: str, unit: str) -> Section:
    """Return a curve over the frames of each video, lowest mean first."""
    known = {
        video: [(float(index), 100 * score) for index, score in enumerate(scores, start=1) if score is not None]
        for video, scores in videos.items()
    }
    means = {video: float(np.mean([y for _, y in points])) for video, points in known.items() if points}
    order = sorted(means, key=lambda video: means[video])
    note = f"{name} of each frame, in the order of their names; the {unit}s with the lowest mean first."
    if len(order) > _VIDEOS:
        note += f" The lowest {_VIDEOS} of {len(order)} are shown."
    charts = [
        line_chart(
            f"{video}: {means[video]:.1f} over {count_of(len(known[video]), 'frame')}",
            [(video, thinned(known[video]))],
            Axes((1, max(2, len(videos[video]))), (0, 100), "frame", name),
        )
        for video in order[:_VIDEOS]
    ]
    return Section("videos", f"By {unit}", paragraph(note) + f'<div class="charts small">{"".join(charts)}</div>')


def calibration_section(found: Mapping[str, Any] | None) -> str:
    """Return the section on calibration.

    Args:
        found: `pixels` and `images` of the sample, `temperature`, and two states: `before` and `after` scaling by it. A
            state has `nll`, `ece` and `bins`: pixels, correct pixels and sum of confidences of each bin. None: no pixel
            is labelled, or there is only one class.
    """
    if found is None:
        return paragraph("None: it needs labelled pixels of two classes or more.")
    limit = " (the end of the range that is searched)" if not 0.0101 < found["temperature"] < 99 else ""
    note = paragraph(
        f"Over {found['pixels']:,} labelled pixels, evenly spaced in {count_of(found['images'], 'image')}. Confidence "
        "is the probability of the predicted class. ECE is the mean gap between confidence and accuracy over 15 bins "
        f"of equal width, weighted by pixels (bins of fewer than {_MIN_BIN} are not shown); NLL is the mean negative "
        "log-likelihood of the reference, in nats. The temperature, a divisor of the logits, is fitted on the same "
        "pixels: it measures the miscalibration of this model here and is not a result on held-out data."
    )
    states = (("uncalibrated", found["before"]), (f"at temperature {found['temperature']:.3g}", found["after"]))
    curves = [(name, _reliable(state["bins"])) for name, state in states]
    chart = line_chart("Reliability", curves, Axes((0, 1), (0, 1), "confidence", "accuracy"), ideal=True)
    heads = [("logits", "text"), ("NLL", "number"), ("ECE %", "number")]
    rows = [
        [
            plain_cell(name),
            number_cell(state["nll"], f"{state['nll']:.4f}"),
            number_cell(state["ece"], percent(state["ece"], 2)),
        ]
        for name, state in states
    ]
    temperature = paragraph(f"Fitted temperature: {found['temperature']:.3f}{limit}.", kind="dim")
    shares = [100 * row[0] / found["pixels"] for row in found["before"]["bins"]]
    bins = bar_chart(
        "Confidence, uncalibrated",
        [index / len(shares) for index in range(len(shares) + 1)],
        shares,
        Axes((0, 1), (0, around(shares, zero=True)[1]), "confidence", "% of pixels"),
    )
    return note + table(heads, rows) + temperature + f'<div class="charts">{chart}{bins}</div>'


def _reliable(bins: Sequence[tuple[int, int, float]]) -> list[tuple[float, float]]:
    """Return mean confidence and accuracy of the bins with enough pixels."""
    return [(confidence / pixels, correct / pixels) for pixels, correct, confidence in bins if pixels >= _MIN_BIN]


def heat_map(matrix: np.ndarray, classes: Sequence[str], name: str = "counts") -> str:
    """Return counts (K, K), rows = reference, as a map of each row's shares.

    It is an image with one pixel per cell, whose opacity grows with the share, so that it fits a light and a dark page.
    Without a script, the map is visible but does not show its counts.
    """
    order = np.arange(len(classes))
    note = ""
    if len(classes) > MAX:
        order = np.sort(np.argsort(-matrix.sum(axis=1), kind="stable")[:MAX])
        note = paragraph(f"The {MAX} of {len(classes)} classes with the most reference pixels; confusion.png has all.")
    counts, names = matrix[np.ix_(order, order)].astype(np.int64), [classes[index] for index in order.tolist()]
    totals = counts.sum(axis=1, keepdims=True)
    shares = counts / np.maximum(totals, 1)
    return (
        f"{note}<figure>{_drawing(counts, shares, names, name)}<output>Point at a cell, or use the arrow keys, to see "
        f"its counts.</output></figure>{values(name, {'names': names, 'counts': counts.tolist()})}"
    )


def _drawing(counts: np.ndarray, shares: np.ndarray, names: Sequence[str], name: str) -> str:
    size = len(names)
    cell = float(np.interp(size, (2, 10, 25, 150), (56, 40, 26, 12)))  # units of the drawing
    letters = min(max(map(len, names)), _LONGEST_NAME)
    margin = 16 + 6.6 * letters
    side = margin + cell * size
    pixels = np.zeros((size, size, 4), np.uint8)
    pixels[..., :3] = _BLUE
    # the root keeps rare confusions visible next to a diagonal of nearly 1
    pixels[..., 3] = np.round(255 * np.sqrt(shares))
    pixels[counts.sum(axis=1) == 0] = _EMPTY
    parts = [
        f'<g transform="translate({margin:.1f} {margin:.1f}) scale({cell:.3f})">'
        f'<image width="{size}" height="{size}" preserveAspectRatio="none" href="{data_uri(pixels)}"/>'
        f'<rect class="mark" width="1" height="1" visibility="hidden" style="stroke-width: {2 / cell:.3f}"/></g>'
    ]
    for index, title in enumerate(names):
        middle = margin + (index + 0.5) * cell
        short = title if len(title) <= _LONGEST_NAME else f"{title[: _LONGEST_NAME - 1]}…"
        parts.append(
            f'<text x="{margin - 6:.1f}" y="{middle + 4:.1f}" text-anchor="end">{text(short)}</text>'
            f'<text transform="translate({middle + 4:.1f} {margin - 6:.1f}) rotate(-90)">{text(short)}</text>'
        )
    if size <= _MAX_NUMBERS:
        parts += [
            _number(share, margin + (column + 0.5) * cell, margin + (row + 0.5) * cell + 3.5)
            for (row, column), share in np.ndenumerate(shares)
            if share >= _MIN_SHARE
        ]
    label = "confusion matrix: a row for each reference class, a column for each predicted one; opacity is the share"
    return (
        f'<svg class="heat" viewBox="0 0 {side + 4:.0f} {side + 4:.0f}" style="--wide: {side:.0f}px" tabindex="0" '
        f'role="img" aria-label="{label}" data-counts="{text(name)}">{"".join(parts)}</svg>'
    )


def _number(share: float, x: float, y: float) -> str:
    kind = "cell full" if share > _FULL else "cell"
    shown = "&lt;1" if share < 0.01 else f"{100 * share:.0f}"
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="middle">{shown}</text>'
