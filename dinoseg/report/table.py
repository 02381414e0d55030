"""Scores as text tables and as CSV: those of classes, and official ones with their intervals."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from dinoseg.core.metric import OBJECT_COUNTS, RowMetric
from dinoseg.utils.csv_text import write_csv_table
from dinoseg.utils.wording import count_of

_COLUMNS = ("iou", "dice", "precision", "recall")
MEANS = {  # labels of scores that are one number over all classes
    "miou": "mIoU",
    "miou_no_background": "mIoU without background",
    "dice": "mean Dice",
    "accuracy": "pixel accuracy",
}
_MAX_CLASSES = 40  # longer tables are in the file only
CHOSEN_HERE = (
    "The thresholds were chosen on this split, so these scores are too high: they are no evidence of a better model. "
    "Score another split, such as mode.split=test."
)
FEW = 10  # units: with fewer, intervals cover less than 95 % (benchmarks/interval_coverage.py)


def class_table(
    scores: Mapping[str, Any],
    classes: Sequence[str],
    background: int | None = None,
    metrics: Sequence[RowMetric] = (),
) -> str:
    """Return the scores of a `ConfusionMatrix` as text, in percent: one row per class, then the means.

    `background` is the background class of the matrix, `metrics` are further metrics of the scores. A class is "absent"
    if neither the reference nor the prediction contains it; "-" is an undefined score.
    """
    headers = ["id", "class", "IoU %", "Dice %", "recall %", "precision %", "pixels"]
    rows = [_text_row(row, classes[row["id"]]) for row in scores["classes"]]
    table = tabulate(rows, headers=headers, disable_numparse=True, colalign=("right", "left", *["right"] * 5))
    present = f"over {scores['present_classes']} of {len(scores['classes'])} classes"
    objects: list[tuple[str, float | None, str]] = []
    if background is not None:
        note = f"without class {background}, {classes[background]}"
        objects = [(MEANS["miou_no_background"], scores["miou_no_background"], note)]
    has_layers = scores["matrix"] is None
    decided = "of all decisions, present or absent" if has_layers else f"of {scores['pixels']:,} pixels"
    means = [
        (MEANS["miou"], scores["miou"], present),
        *objects,
        (MEANS["dice"], scores["dice"], present),
        (MEANS["accuracy"], scores["accuracy"], decided),
        ("mean class accuracy", scores["mean_accuracy"], "over the classes of the reference"),
    ]
    lines = [(name, _with_sign(value), note) for name, value, note in means]
    lines += [(name, metric_text(metric, name, scores[name]), "") for metric in metrics for name in metric.scores]
    text = tabulate(
        lines,
        tablefmt="plain",
        disable_numparse=True,
        colalign=("left", "right", "left"),
    )
    notes = _describe_thresholds(scores["thresholds"], classes) if "thresholds" in scores else ""
    columns = [name for metric in metrics for name in metric.class_columns]
    shown = f"{_object_table(scores['classes'], columns, classes)}\n\n" if columns else ""
    advice = "".join(f"\n\nnote:         {each}" for each in advise(metrics, scores))
    return f"{table}\n\n{shown}{text}{notes}{advice}"


def advise(metrics: Sequence[RowMetric], scores: Mapping[str, Any]) -> list[str]:
    """Return sentences on what the scores of an evaluation do not show, each once."""
    return [text for text in dict.fromkeys(metric.advise(scores) for metric in metrics) if text]


def _object_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], classes: Sequence[str]) -> str:
    """Return scores of the objects of each class as text, in percent, and `OBJECT_COUNTS`."""
    cells = [
        [
            str(row["id"]),
            classes[row["id"]],
            *(percent(row[key]) for key in columns),
            *(str(row[key]) if any(row[each] for each in OBJECT_COUNTS) else "-" for key in OBJECT_COUNTS),
        ]
        for row in rows
    ]
    heads = ["id", "class", *(f"{key} %" for key in columns), *OBJECT_COUNTS]
    aligned = ("right", "left", *["right"] * (len(heads) - 2))
    return tabulate(cells, headers=heads, disable_numparse=True, colalign=aligned)


def _describe_thresholds(thresholds: Mapping[str, Any], classes: Sequence[str]) -> str:
    values = thresholds["values"]
    named = "by fold: see scores.json"
    if not isinstance(values, Mapping):
        named = ", ".join(f"{name} {value:.4g}" for name, value in zip(classes, values, strict=True))
    place = "" if thresholds["chosen_on"] is None else f" (chosen on {thresholds['chosen_on']})"
    return f"\n\nthresholds:   {named}{place}" + (f"\nnote:         {CHOSEN_HERE}" if thresholds["chosen_here"] else "")


def class_statistics(mask: np.ndarray, classes: Sequence[str]) -> str:
    """Return the class distribution of one mask (H, W), or of layers (K, H, W), as text that ends in a line break."""
    ids, counts = np.unique(mask, return_counts=True)
    if mask.ndim > 2:
        ids = np.flatnonzero(mask.any(axis=(1, 2)))
        counts = mask.sum(axis=(1, 2), dtype=np.int64)[ids]
    pixels = mask.shape[-2] * mask.shape[-1]
    lines = [
        "Segmentation statistics",
        "=" * 50,
        f"Total pixels: {pixels:,}",
        f"Classes found: {len(ids)}",
        "",
        "Class distribution:",
        "-" * 50,
    ]
    for index, count in zip(ids.tolist(), counts.tolist(), strict=True):
        share = 100 * count / pixels
        lines.append(f"{index:2d}: {classes[index]:<25} - {count:>8,} px ({share:5.2f}%)")
    return "\n".join(lines) + "\n"


def write_scores_csv(path: str | Path, scores: Mapping[str, Any], classes: Sequence[str]) -> None:
    """Write one line per class, with scores in 0..1; an undefined score is an empty cell."""
    known = ["id", "class", *_COLUMNS, "pixels", "predicted_pixels"]
    columns = [*known, *(key for key in scores["classes"][0] if key not in known)]  # the last ones of further metrics
    write_csv_table(path, columns, [{**row, "class": classes[row["id"]]} for row in scores["classes"]])


def _text_row(row: Mapping[str, Any], name: str) -> list[str]:
    if row["iou"] is None:
        return [str(row["id"]), name, "absent", "", "", "", "0"]
    scores = [percent(row[key]) for key in ("iou", "dice", "recall", "precision")]
    return [str(row["id"]), name, *scores, f"{row['pixels']:,}"]


def metric_text(metric: RowMetric, name: str, score: float | None) -> str:
    """Return a score of a metric as text: in percent, or as a plain number if it may lie outside 0..1."""
    return _with_sign(score) if score is None or name not in metric.unbounded else f"{score:.4g}"


def _with_sign(score: float | None) -> str:
    return "-" if score is None else f"{100 * score:.1f} %"


def scores_table(result: Mapping[str, Any]) -> str:
    """Return the scores of `scoring.summary` as text, in percent: class scores for few classes, then the totals."""
    unit = result["unit"]
    parts = []
    if 0 < len(result["per_class"]) <= _MAX_CLASSES:
        columns = {key: [row[key] for row in result["per_class"]] for key in result["per_class"][0]}
        shares = {
            key for key, values in columns.items() if all(value is None or type(value) is float for value in values)
        }
        rows = [[percent(row[key], 2) if key in shares else row[key] for key in columns] for row in result["per_class"]]
        headers = [f"{key} %" if key in shares else key for key in columns]
        parts.append(tabulate(rows, headers=headers, disable_numparse=True))
    none = _no_interval(result["n"], unit)
    rows = [
        [key, percent(value, 2), *_interval(result["ci95"][key], none, result["n"])]
        for key, value in result["scores"].items()
    ]
    parts.append(_interval_table(rows, [result["protocol"], "%"], f"{unit}s"))
    return "\n\n".join(parts)


def few_units(units: int, unit: str) -> str:
    """Return a warning about intervals over few units; empty for enough units, or for too few to have intervals."""
    if not 2 <= units < FEW:
        return ""
    return (
        f"The 95 % intervals are over {count_of(units, unit)}: with fewer than {FEW} their true coverage is lower, "
        "much lower for rare classes."
    )


def difference_table(differences: Mapping[str, Mapping[str, Any]], unit: str, scored_unit: str) -> str:
    """Return paired differences as text, in percentage points; intervals are over groups of scored units."""
    counts = next(iter(differences.values()))
    none = _no_interval(counts["n"], unit)
    rows = [
        [key, percent(row["value"], 2, "+"), *_interval(row["ci95"], none, row["n"], "+")]
        for key, row in differences.items()
    ]
    table = _interval_table(rows, ["second - first", "points"], f"shared {unit}s")
    if not counts["n"]:
        return f"second - first: none. No {scored_unit} could be scored in both folders."
    left_out = (
        f"Left out of this difference: {count_of(counts['left_out'], 'file')} or sequences scored in only one folder."
    )
    return f"{table}\n{left_out}" if counts["left_out"] else table


def _interval_table(rows: list[list[str]], headers: list[str], units: str) -> str:
    columns = ("left", "right", "left", "right")
    return tabulate(rows, headers=[*headers, "95 % interval", f"over {units}"], disable_numparse=True, colalign=columns)


def _no_interval(units: int, unit: str) -> str:
    """Return the placeholder for a missing interval."""
    return f"- (needs two {unit}s)" if units < 2 else "-"


def percent(value: float | None, digits: int = 1, sign: str = "") -> str:
    """Return a share in 0..1 as percent; a dash if undefined."""
    return "-" if value is None else f"{100 * value:{sign}z.{digits}f}"


def _interval(limits: list[float] | None, none: str, units: int, sign: str = "") -> tuple[str, str]:
    """Return an interval as text, and its number of units."""
    text = none if limits is None else f"{percent(limits[0], 2, sign)} .. {percent(limits[1], 2, sign)}"
    return text, str(units)
