"""Report of an image evaluation: scores, errors, calibration and provenance."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dinoseg.core.metric import OBJECT_COUNTS, RowMetric
from dinoseg.report.html.charts import MAX, Axes, bar_chart, line_chart, range_around, thin
from dinoseg.report.html.page import format_interval, render
from dinoseg.report.html.pictures import EvaluatedImages, ObjectShot, Shot, object_card, prediction_card
from dinoseg.report.table import CHOSEN_HERE, MEANS, advise, few_units, metric_text
from dinoseg.utils.wording import count_of

_HISTOGRAM_BARS = 20
_MAX_VIDEOS = 24  # videos with a curve
_MIN_BIN_PIXELS = 20  # of a bin in the reliability chart
_NOTES = {
    "miou": "mean over the classes present",
    "miou_no_background": "mean over the other classes present",
    "dice": "mean over the classes present",
    "accuracy": "share of the labelled pixels",
}
_TRAINING_CURVES = (  # title, keys of the log by label, name of the axis, and its factor
    ("Loss", {"training": "train/loss", "validation": "val/loss"}, "loss", 1),
    ("mIoU", {"training": "train/miou", "validation": "val/miou"}, "mIoU, %", 100),
    ("Pixel accuracy", {"training": "train/accuracy", "validation": "val/accuracy"}, "accuracy, %", 100),
    ("Pseudo-labels", {"confident": "train/confident", "accuracy": "train/pseudo_accuracy"}, "% of pixels", 100),
)

MAX_CLASSES = 150  # of the confusion matrix: those with the most pixels in the reference
_MAX_NUMBERED = 20  # classes up to which the cells carry numbers
_LONGEST_NAME = 24
_MIN_SHARE = 0.001  # minimum share with a number
_FULL = 0.3  # share above which the number is light
_BLUE = (31, 95, 191)
_EMPTY = (128, 128, 128, 40)  # a row without pixels


@dataclass(frozen=True)
class EvaluationScores:
    """Scores over all images.

    Args:
        values: result of `ConfusionMatrix.compute`.
        intervals: 95 % interval by score name, and `iou/ID` of each class; None without an interval.
        official: result of `scoring.summary`; None without a protocol.
        metrics: further metrics, whose scores are among the values.
        charts: of the classes.
    """

    values: Mapping[str, Any]
    intervals: Mapping[str, list[float] | None]
    official: Mapping[str, Any] | None = None
    metrics: Sequence[RowMetric] = ()
    charts: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True)
class ErrorAnalysis:
    """Errors of a model, and its confidence in them.

    Args:
        mious: mIoU of each image; None without labelled pixels.
        best: best images, best first.
        worst: worst images, worst first.
        distances: upper ends of the bands around boundaries, in pixels.
        boundary: (bands, 2) labelled and wrong pixels.
        calibration: `pixels` and `images` of the sample, `temperature`, and two states, `before` and `after` scaling
            by it. A state has `nll`, `ece` and `bins`: pixels, correct pixels and sum of confidences of each bin. None:
            no pixel is labelled, or there is only one class.
        objects: images with the most objects that are missed or invented.
    """

    mious: Sequence[float | None]
    best: Sequence[Shot]
    worst: Sequence[Shot]
    distances: Sequence[int]
    boundary: np.ndarray
    calibration: Mapping[str, Any] | None
    objects: Sequence[ObjectShot] = ()


def evaluation_page(
    evaluated: EvaluatedImages,
    scores: EvaluationScores,
    errors: ErrorAnalysis,
    *,
    title: str,
    subtitle: str,
    about: Mapping[str, Any],
    training: Sequence[Mapping[str, Any]] | None = None,
    selecting: str | None = None,
) -> str:
    """Return the page as HTML.

    Args:
        evaluated: the images.
        scores: of all images.
        errors: by image, distance from boundaries and confidence.
        title: plain text.
        subtitle: a line below the title.
        about: see `evaluation.run_facts.about_run`.
        training: rows of the training's metrics.jsonl; None without these.
        selecting: score of its validations that selected the checkpoint; None if unknown.
    """
    units = evaluated.count_units()
    found = scores.values
    calibration = errors.calibration
    chosen_here = found.get("thresholds", {}).get("chosen_here", False)
    unscored = "" if found["pixels"] else "No pixel of the reference is labelled, so nothing is scored."
    return render(
        "evaluation.html.jinja",
        title=title,
        subtitle=subtitle,
        warnings=[
            few_units(units, evaluated.unit),
            unscored,
            CHOSEN_HERE if chosen_here else "",
            *advise(scores.metrics, found),
        ],
        scores=found,
        means={key: (name, _NOTES[key]) for key, name in MEANS.items() if key in found},
        metrics=[
            (name, metric_text(metric, name, found[name]), _metric_interval(metric, name, scores.intervals.get(name)))
            for metric in scores.metrics
            for name in metric.scores
        ],
        class_charts=scores.charts,
        object_columns=[name for metric in scores.metrics for name in metric.class_columns],
        object_counts=OBJECT_COUNTS,
        object_cards=[object_card(shot, evaluated) for shot in errors.objects],
        intervals=scores.intervals,
        unit=evaluated.unit,
        units=units,
        images=len(evaluated.images),
        classes=evaluated.classes,
        palette=evaluated.palette,
        heat_map=found["matrix"] and heat_map(np.asarray(found["matrix"], dtype=np.int64), evaluated.classes),
        histogram=image_histogram(errors.mious),
        defined=[miou for miou in errors.mious if miou is not None],
        shots={
            heading: [prediction_card(shot, evaluated) for shot in shots]
            for heading, shots in (("Worst images", errors.worst), ("Best images", errors.best))
        },
        boundary=boundary_rows(errors.distances, errors.boundary),
        videos=[]
        if len({*evaluated.units}) == len(evaluated.units)
        else video_charts(_group_scores(evaluated.units, errors.mious), "mIoU %"),
        calibration=calibration and {**calibration, "charts": calibration_charts(calibration)},
        min_bin_pixels=_MIN_BIN_PIXELS,
        training=training_charts(training or [], selecting),
        max_points=MAX,
        official=scores.official,
        about=about,
    )


def image_histogram(mious: Sequence[float | None]) -> dict[str, Any]:
    """Return a chart of the number of images by their mIoU."""
    defined = [100 * miou for miou in mious if miou is not None]
    counts, edges = np.histogram(defined, bins=_HISTOGRAM_BARS, range=(0, 100))
    axes = Axes((0, 100), (0, max(1.0, 1.05 * counts.max())), "mIoU of the image, %", "images")
    return bar_chart("Images by mIoU", edges.tolist(), counts.tolist(), axes)


def boundary_rows(distances: Sequence[int], bands: np.ndarray) -> list[tuple[str, list[float | None]]]:
    """Return the name of each distance from boundaries, and its shares; the last row holds all pixels farther away.

    These are of all errors and of all pixels at the distance, and of wrong pixels in the band alone.
    """
    pixels, wrong = bands.sum(axis=0)
    cumulative = np.concatenate([np.cumsum(bands[:-1], axis=0), bands[-1:]])
    names = [f"within {end} px" for end in distances] + [f"beyond {distances[-1]} px"]
    return [
        (name, [_divide(errors, wrong), _divide(near, pixels), _divide(band[1], band[0])])
        for name, (near, errors), band in zip(names, cumulative.tolist(), bands.tolist(), strict=True)
    ]


def _metric_interval(metric: RowMetric, name: str, limits: Sequence[float] | None) -> str:
    if limits is None:
        return ""
    return " .. ".join(f"{end:.4g}" for end in limits) if name in metric.unbounded else format_interval(limits)


def _divide(part: float, whole: float) -> float | None:
    return float(part / whole) if whole else None


def _group_scores(groups: Sequence[str], scores: Sequence[float | None]) -> dict[str, list[float | None]]:
    found: dict[str, list[float | None]] = {}
    for group, score in zip(groups, scores, strict=True):
        found.setdefault(group, []).append(score)
    return found


def video_charts(videos: Mapping[str, Sequence[float | None]], name: str) -> list[dict[str, Any]]:
    """Return a curve over the frames of each video, lowest mean first; at most `_MAX_VIDEOS`."""
    known = {
        video: [(float(index), 100 * score) for index, score in enumerate(scores, start=1) if score is not None]
        for video, scores in videos.items()
    }
    means = {video: float(np.mean([y for _, y in points])) for video, points in known.items() if points}
    return [
        line_chart(
            f"{video}: {means[video]:.1f} over {count_of(len(known[video]), 'frame')}",
            [(video, thin(known[video]))],
            Axes((1, max(2, len(videos[video]))), (0, 100), "frame", name),
        )
        for video in sorted(means, key=lambda video: means[video])[:_MAX_VIDEOS]
    ]


def calibration_charts(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the reliability before and after scaling, and the histogram of the confidence."""
    states = (("uncalibrated", found["before"]), (f"at temperature {found['temperature']:.3g}", found["after"]))
    curves = [
        # mean confidence and accuracy of the bins with enough pixels
        (name, [(sure / pixels, right / pixels) for pixels, right, sure in state["bins"] if pixels >= _MIN_BIN_PIXELS])
        for name, state in states
    ]
    shares = [100 * row[0] / found["pixels"] for row in found["before"]["bins"]]
    edges = [index / len(shares) for index in range(len(shares) + 1)]
    axes = Axes((0, 1), (0, range_around(shares, zero=True)[1]), "confidence", "% of pixels")
    return [
        line_chart("Reliability", curves, Axes((0, 1), (0, 1), "confidence", "accuracy"), ideal=True),
        bar_chart("Confidence, uncalibrated", edges, shares, axes),
    ]


def training_charts(rows: Sequence[Mapping[str, Any]], selecting: str | None = None) -> list[dict[str, Any]]:
    """Return the curves of a training's log, mIoU and accuracy in percent; with that of another selecting score."""
    panels = list(_TRAINING_CURVES)
    if selecting is not None and not any(f"val/{selecting}" in keys.values() for _, keys, _, _ in panels):
        panels.append((selecting, {"validation": f"val/{selecting}"}, selecting, 1))
    charts = []
    for title, keys, name, factor in panels:
        curves = [(label, points) for label, key in keys.items() if (points := _finite_points(rows, key, factor))]
        if not curves:
            continue
        steps = [x for _, points in curves for x, _ in points]
        values = [y for _, points in curves for _, y in points]
        across = range_around(steps) if len(set(steps)) > 1 else (steps[0] - 1, steps[0] + 1)
        charts.append(line_chart(title, curves, Axes(across, range_around(values), "step", name)))
    return charts


def _finite_points(rows: Sequence[Mapping[str, Any]], key: str, factor: float) -> Sequence[tuple[float, float]]:
    known = {row["step"]: factor * row[key] for row in rows if row.get(key) is not None and math.isfinite(row[key])}
    return thin(sorted(known.items()))


def heat_map(matrix: np.ndarray, classes: Sequence[str]) -> dict[str, Any]:
    """Return counts (K, K), rows = reference, as an image of each row's shares with one pixel per cell.

    Its opacity grows with the share, so that it fits a light and a dark page. Of more than `MAX_CLASSES` classes, those
    with the most pixels in the reference stay.
    """
    order = np.sort(np.argsort(-matrix.sum(axis=1), kind="stable")[:MAX_CLASSES])
    counts, names = matrix[np.ix_(order, order)], [classes[index] for index in order.tolist()]
    size = len(names)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    pixels = np.zeros((size, size, 4), np.uint8)
    pixels[..., :3] = _BLUE
    # the root keeps rare confusions visible next to a diagonal of nearly 1
    pixels[..., 3] = np.round(255 * np.sqrt(shares))
    pixels[counts.sum(axis=1) == 0] = _EMPTY
    numbers = [
        {"row": row, "column": column, "full": share > _FULL, "shown": f"{100 * share:.0f}" if share >= 0.01 else "<1"}
        for (row, column), share in np.ndenumerate(shares)
        if share >= _MIN_SHARE and size <= _MAX_NUMBERED
    ]
    return {
        "left_out": len(classes) - size,
        "pixels": pixels,
        "names": [name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…" for name in names],
        "cell": float(np.interp(size, (2, 10, 25, 150), (56, 40, 26, 12))),  # units of the drawing
        "margin": 16 + 6.6 * min(max(map(len, names)), _LONGEST_NAME),
        "numbers": numbers,
        "data": {"names": names, "counts": counts.tolist()},
    }
