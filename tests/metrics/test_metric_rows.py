"""Counts of metrics over ranks and images, and what intervals are made of."""

from functools import partial

import numpy as np
import pytest
import torch
from mistakes import assert_refused
from test_metric_contract import CLASSES, METRICS, OUTLINES, AreaError, Share, score, ugly_case

from dinoseg.core.geometry import lattice
from dinoseg.core.metric import LabelledImage, PredictedImage, sum_counts
from dinoseg.core.shapes import Batch
from dinoseg.metrics.flat import FlatMetric, flatten_counts
from dinoseg.metrics.layers import LayerMetric
from dinoseg.metrics.miou import MeanIoU
from dinoseg.metrics.rows import MetricRows
from dinoseg.testing import check_metric
from dinoseg.training.rank_messages import decode_message, encode_message


class Data:
    classes, ignore_index = ("a", "b", "c", "d"), 255
    names = tuple(f"{number:02}" for number in range(99))


def gather_rows(images, world_size):
    """Return the scores of ranks that exchange their rows as messages, and the rows of the first rank."""
    metrics = [METRICS["boundary_iou"], METRICS["nsd"], METRICS["ece"]]
    ranks = [MetricRows(metrics, Data(), rank, world_size) for rank in range(world_size)]
    for rank, rows in enumerate(ranks):
        for ids, mask in images[rank::world_size]:
            rng = torch.Generator().manual_seed(ids.size)
            logits = torch.randn(1, CLASSES, *mask[lattice(mask.shape)].shape, generator=rng)
            pair = torch.from_numpy(mask)[None], torch.from_numpy(ids)[None]
            rows.add(Batch(torch.zeros(1, 3, *mask.shape), pair[0], ["x"]), pair[1], logits)
    sent = [row for rows in ranks for row in decode_message(encode_message(rows._rows))]
    result = {"classes": [{"id": index} for index in range(CLASSES)]}
    ranks[0].add_scores(result, lambda _: sent)
    return result, ranks[0]


@pytest.mark.parametrize("world_size", [2, 3])
def test_any_number_of_ranks_gives_equal_scores(world_size):
    images = [pair for seed in range(6) for pair in ugly_case(seed)]
    one, _ = gather_rows(images, 1)
    assert gather_rows(images, world_size)[0] == one
    for name, metric in OUTLINES:
        assert one[name] == score(metric, images)[name]
        assert [row[name] for row in one["classes"]] != [None] * CLASSES
    assert 0 < one["ece"] < 1


def test_flat_sums_give_the_scores_of_counts():
    images = [pair for seed in range(6) for pair in ugly_case(seed)]
    for name, metric in (*OUTLINES, ("miou", MeanIoU()), ("share", Share())):
        rows = [metric.count(PredictedImage(ids), LabelledImage(mask, CLASSES)) for ids, mask in images]
        flat = FlatMetric.of(metric, rows[0])
        sums = np.stack([flatten_counts(row) for row in rows])
        assert sums.shape == (len(rows), flat.size) and name in flat.keys
        assert float(flat.scores(sums.sum(0))[name]) == pytest.approx(score(metric, images)[name], abs=1e-12)


BLANK = np.zeros((CLASSES, 2, 4), np.uint8)


def rows_of(metric, ids=BLANK[0], mask=BLANK[0]):
    rows = MetricRows([metric], Data())
    batch = Batch(torch.zeros(1, 3, *mask.shape), torch.from_numpy(mask)[None], ["04"])
    rows.add(batch, torch.from_numpy(ids)[None], torch.zeros(1, CLASSES, 1, 1))
    return rows


def add_scores(rows):
    rows.add_scores({"classes": []}, list)


def test_a_score_outside_its_bounds_is_refused():
    ids, mask = np.full((2, 4), CLASSES - 1, np.uint8), np.zeros((2, 4), np.uint8)
    mask[0, 0] = CLASSES - 1
    words = "area_error of AreaError is 7, outside 0..1. Name it in `unbounded`"
    assert_refused(lambda: add_scores(rows_of(AreaError(), ids, mask)), words)
    metric, result = AreaError(), {"classes": []}
    metric.unbounded = ("area_error",)
    rows_of(metric, ids, mask).add_scores(result, list)
    assert result["area_error"] == 7
    layers = BLANK.copy()
    layers[:, 0, 0] = 1
    # errors of layers name the metric of a layer
    assert_refused(lambda: add_scores(rows_of(LayerMetric(AreaError()), BLANK + 1, layers)), words)


@pytest.mark.parametrize("excess", [-1e-6, -1e-12, 1e-12, 1e-6])
def test_shares_may_exceed_their_bounds_by_rounding(excess):
    rows = rows_of(OtherScores({"share": np.float64(excess + (excess > 0))}))
    if abs(excess) < 1e-9:
        add_scores(rows)
    else:
        assert_refused(lambda: add_scores(rows), "outside 0..1")


def test_an_infinite_score_without_its_images_is_refused():
    metric = AreaError()
    metric.unbounded, metric.compute = ("area_error",), lambda sums: {"area_error": np.array(np.inf)}
    words = ("area_error of AreaError is inf", "area_error_infinite_images", "`totals`")
    assert_refused(lambda: add_scores(rows_of(metric)), *words)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_non_finite_counts_name_image_and_metric(value):
    words = f"of Share returns correct={value} for the image 04. Return 0 in all counts"
    assert_refused(lambda: rows_of(Share(dtype=np.float64, state=value)), words)


class Filled(Share):
    """Counts of a form that depends on the image."""

    forms = ({"correct": 1, "labelled": 1},)

    def count(self, prediction, sample):
        return {name: np.asarray(value) for name, value in self.forms[int(prediction.ids.max())].items()}


@pytest.mark.parametrize("other", [{"right": 1, "labelled": 1}, {"correct": [1, 1], "labelled": 1}])
def test_counts_of_different_names_or_shapes_are_refused(other):
    metric = Filled()
    metric.forms = (*metric.forms, other)
    rows = rows_of(metric)
    second = torch.ones(1, 2, 4, dtype=torch.uint8)
    rows.add(Batch(torch.zeros(1, 3, 2, 4), second, ["b"]), second, torch.zeros(1, CLASSES, 1, 1))
    words = ("of Filled returns counts of ", " for the image 01, and of ", " for 00")
    assert_refused(lambda: add_scores(rows), *words)


class Returned(Share):
    def __init__(self, counts):
        self.counts = counts

    def count(self, prediction, sample):
        return self.counts


@pytest.mark.parametrize(
    "counts",
    [{"correct": "1"}, {"correct": None}, {"correct": 1j}, {"correct": np.timedelta64(1)}, (1, 1)],
    ids=["text", "object", "complex", "time", "tuple"],
)
def test_counts_that_are_no_numbers_are_refused(counts):
    metric, words = Returned(counts), "`count` of Returned returns"
    for wrapped in (metric, LayerMetric(metric)):
        assert_refused(partial(rows_of, wrapped, BLANK, BLANK), words)
    assert_refused(lambda: check_metric(metric), words, error=AssertionError)


def test_layers_of_different_counts_are_refused():
    metric = Filled()
    metric.forms = (*metric.forms, {"correct": 1, "labelled": 1, "other": 1})
    layers = BLANK.copy()
    layers[1] = 1
    words = ("of Filled returns counts of ", " for the image 04 (layer 1)")
    assert_refused(lambda: rows_of(LayerMetric(metric), layers, layers), *words)


class OtherScores(Share):
    def __init__(self, scores):
        super().__init__()
        self.found = scores

    def compute(self, sums):
        return self.found


@pytest.mark.parametrize("scores", [{}, {"share": 1.0, "miou": 1.0}, {"share": [0.5, 0.5]}])
def test_scores_that_do_not_fit_the_class_are_refused(scores):
    words = "`compute` of OtherScores returns"
    assert_refused(lambda: add_scores(rows_of(OtherScores(scores))), words)
    if not scores:
        assert_refused(lambda: add_scores(rows_of(LayerMetric(OtherScores({})), BLANK, BLANK)), words)


@pytest.mark.parametrize(("value", "total"), [(np.uint8(200), 800), (np.True_, 4), (np.float16(60000), 240000.0)])
def test_sums_of_narrow_counts_do_not_overflow(value, total):
    found = sum_counts([{"pixels": value}] * 4)["pixels"]
    assert found == total and found.dtype in (np.int64, np.float64)
