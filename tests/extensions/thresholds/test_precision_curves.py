"""Precision-recall curves: the scores of each threshold, in a file, and as charts without undefined classes."""

import csv

import numpy as np

from dinoseg.core.metric import BINS
from dinoseg.extensions.thresholds.curves import CURVES, draw_curves
from dinoseg.metrics import AveragePrecision, MeanIoU
from dinoseg.metrics.rows import MetricRows


class Data:
    classes = ("a", "b", "c")
    names = ("0", "1")
    ignore_index = 255
    palette = ((255, 255, 255), (9, 0, 0), (0, 9, 0))


def draw_rows():
    """Return the counts of two images, in which the last class has no positive pixel."""
    rng = np.random.default_rng(0)
    rows = MetricRows([MeanIoU(), AveragePrecision()], Data())
    totals = rng.integers(0, 3, (2, 3, BINS))
    positives = rng.binomial(totals, 0.4) * np.array([1, 1, 0])[:, None]
    rows.counts = [
        [{}, {}],
        [{"positives": hits, "totals": every} for hits, every in zip(positives, totals, strict=True)],
    ]
    return rows, positives.sum(axis=0), totals.sum(axis=0)


def test_each_point_is_the_score_of_its_threshold(tmp_path):
    rows, positives, totals = draw_rows()
    charts = draw_curves(rows, Data(), tmp_path)
    with (tmp_path / CURVES).open() as file:
        points = list(csv.DictReader(file))
    assert len(points) == 3 * BINS
    for number, point in enumerate(points):
        label, level = divmod(number, BINS)
        hits = positives[label, level:].sum()
        predicted = totals[label, level:].sum()
        assert point["class"] == Data.classes[label] and float(point["threshold"]) == level / BINS
        wholes = {"precision": (hits, predicted), "recall": (hits, positives[label].sum())}
        wholes["dice"] = (2 * hits, predicted + positives[label].sum())
        for name, (part, whole) in wholes.items():
            assert point[name] == "" if whole == 0 else np.isclose(float(point[name]), part / whole)
    (chart,) = charts
    drawn = sorted((curve["name"][0], curve["color"]) for curve in chart["curves"])
    assert drawn == [("a", (255, 255, 255)), ("b", (9, 0, 0))]


def test_other_metrics_have_no_curves(tmp_path):
    assert draw_curves(MetricRows([MeanIoU()], Data()), Data(), tmp_path) == []
    assert not (tmp_path / CURVES).exists()
