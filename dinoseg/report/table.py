"""Class scores as a text table and as CSV."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from dinoseg.core.metric import Metric
from dinoseg.utils.csv_text import write_csv_table

_COLUMNS = ("iou", "dice", "precision", "recall")
MEANS = {  # labels of scores that are one number over all classes
    "miou": "mIoU",
    "miou_no_background": "mIoU without background",
    "dice": "mean Dice",
    "accuracy": "pixel accuracy",
}


def class_table(
    scores: Mapping[str, Any], classes: Sequence[str], background: int | None = None, metrics: Sequence[Metric] = ()
) -> str:
    """Return the scores of a `ConfusionMatrix` as text, in percent: one row per class, then the means.

    `background` is the background class of the matrix, `metrics` are further metrics of the scores. A class is "absent"
    if neither the reference nor the prediction contains it; "-" is an undefined score.
    """
    headers = ["id", "class", "IoU %", "Dice %", "recall %", "precision %", "pixels"]
    rows = [_text_row(row, classes[row["id"]]) for row in scores["classes"]]
    table = tabulate(rows, headers=headers, disable_numparse=True, colalign=("right", "left", *["right"] * 5))
    present = f"over {scores['present_classes']} of {len(scores['classes'])} classes"
    is_layered = scores["matrix"] is None
    objects: list[tuple[str, float | None, str]] = []
    if background is not None:
        note = f"without class {background}, {classes[background]}"
        objects = [(MEANS["miou_no_background"], scores["miou_no_background"], note)]
    decided = "of all decisions, present or absent" if is_layered else f"of {scores['pixels']:,} pixels"
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
    return f"{table}\n\n{text}"


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
    scores = [_percent(row[key]) for key in ("iou", "dice", "recall", "precision")]
    return [str(row["id"]), name, *scores, f"{row['pixels']:,}"]


def metric_text(metric: Metric, name: str, score: float | None) -> str:
    """Return a score of a metric as text: in percent, or as a plain number if it may lie outside 0..1."""
    return _with_sign(score) if score is None or name not in metric.unbounded else f"{score:.4g}"


def _with_sign(score: float | None) -> str:
    return "-" if score is None else f"{100 * score:.1f} %"


def _percent(score: float | None) -> str:
    return "-" if score is None else f"{100 * score:.1f}"
