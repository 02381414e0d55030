"""Precision-recall curves of each class from the counts of `AveragePrecision`: a CSV file and charts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dinoseg.core.metric import BINS, Counts, sum_counts
from dinoseg.core.shapes import SegmentationData
from dinoseg.metrics.average_precision import AveragePrecision, sum_from_above
from dinoseg.metrics.counts import ratio
from dinoseg.metrics.rows import MetricRows
from dinoseg.report.html.charts import Axes, line_chart, thin
from dinoseg.report.table import percent
from dinoseg.utils.csv_text import write_csv_table

CURVES = "precision_recall.csv"  # in a run folder
_AT_ONCE = 4  # curves in a chart: as many as there are line styles
_MAX_CLASSES = 24


def draw_curves(rows: MetricRows, data: SegmentationData, out_dir: Path) -> list[dict[str, Any]]:
    """Write the curves of all classes to `out_dir`, and return charts; [] if the rows have no `AveragePrecision`.

    The classes of lowest average precision come first, in their own colours. A class without a positive pixel
    has no curve in the charts.
    """
    drawn: list[dict[str, Any]] = []
    for metric, counts in zip(rows.metrics, rows.counts, strict=True):
        if not isinstance(metric, AveragePrecision):
            continue
        sums = sum_counts(counts)
        points = compute_curves(sums)
        table = [
            {
                "class": name,
                **{
                    key: None if np.isnan(values[label, level]) else values[label, level]
                    for key, values in points.items()
                },
            }
            for label, name in enumerate(data.classes)
            for level in range(BINS)
        ]
        write_csv_table(out_dir / CURVES, ["class", *points], table)
        print(f"curves:       {out_dir}/{CURVES}")
        precision = metric.per_class(sums)["average_precision"]
        known = [
            label for label in np.argsort(precision, kind="stable")[:_MAX_CLASSES].tolist() if precision[label] >= 0
        ]
        lines = [(f"{data.classes[label]} ({percent(precision[label])} %)", _trace(points, label)) for label in known]
        axes = Axes((0, 1), (0, 1), "recall", "precision")
        colors = [data.palette[label] for label in known]
        parts = [slice(start, start + _AT_ONCE) for start in range(0, len(lines), _AT_ONCE)]
        title = "Precision and recall (average precision)"
        drawn = [line_chart(title, lines[part], axes, colors=colors[part]) for part in parts]
    return drawn


def compute_curves(sums: Counts) -> dict[str, np.ndarray]:
    """Return threshold, recall, precision and Dice (K, 1024) of each class at the lower edge of each bin."""
    hits, predicted = sum_from_above(sums["positives"]), sum_from_above(sums["totals"])
    positive = hits[:, :1]
    return {
        "threshold": np.broadcast_to(np.arange(BINS) / BINS, hits.shape),
        "recall": ratio(hits, positive),
        "precision": ratio(hits, predicted),
        "dice": ratio(2 * hits, positive + predicted),
    }


def _trace(points: Mapping[str, np.ndarray], label: int) -> Sequence[tuple[float, float]]:
    """Return the points (recall, precision) of a class, without those that equal their neighbours: empty bins."""
    pairs = zip(points["recall"][label].tolist(), points["precision"][label].tolist(), strict=True)
    return thin([*dict.fromkeys(pair for pair in pairs if not np.isnan(pair[1]))])
