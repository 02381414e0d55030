"""Counts of metrics over ranks and images, and what intervals are made of."""

from itertools import cycle

import numpy as np
import pytest
import torch
from mistakes import refusals
from test_metric_contract import CLASSES, METRICS, OUTLINES, Share, score, ugly_case

from dinoseg.core import metric as metric_module
from dinoseg.core.geometry import lattice
from dinoseg.core.metric import LabelledImage, PredictedImage, RowMetric, sum_counts
from dinoseg.core.shapes import Batch
from dinoseg.evaluation.unit_scores import leave_units_out
from dinoseg.metrics.layers import LayerMetric
from dinoseg.metrics.miou import MeanIoU
from dinoseg.metrics.rows import MetricRows
from dinoseg.training.rendezvous import decode_message, encode_message


class Data:
    classes = ("a", "b", "c", "d")
    ignore_index = 255
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


@pytest.mark.parametrize("at_once", [1, 2**7, 2**22])
def test_scores_without_a_unit_are_those_of_the_other_rows(monkeypatch, at_once):
    monkeypatch.setattr(metric_module, "_AT_ONCE", at_once)
    images = [pair for seed in range(6) for pair in ugly_case(seed)]
    units = [number % 7 for number in range(len(images))]
    for name, metric in (*OUTLINES, ("miou", MeanIoU()), ("share", Share())):
        rows = [metric.count(PredictedImage(ids), LabelledImage(mask, CLASSES)) for ids, mask in images]
        found = metric.leave_one_out(rows, units)
        expected = RowMetric.leave_one_out(metric, rows, units)
        assert found.keys() == metric.scores.keys() and np.isfinite(found[name]).all()
        assert {key: each.tolist() for key, each in found.items()} == {
            key: pytest.approx(each.tolist(), abs=1e-12, nan_ok=True) for key, each in expected.items()
        }


BLANK = np.zeros((CLASSES, 2, 4), np.uint8)
COUNTS = {"correct": 1}


class Given(Share):
    """A metric of given counts, of an image or a layer after the other in turn, and of given scores."""

    def __init__(self, *counts, unbounded=(), **scores):
        super().__init__()
        self.rows = cycle(counts or [COUNTS])
        self.unbounded = unbounded
        self.found = scores

    def count(self, prediction, sample):
        return next(self.rows)

    def compute(self, sums):
        return self.found


def rows_of(metric, ids=BLANK[0], mask=BLANK[0], images=1):
    """Return the counts of the same image, once or several times."""
    rows = MetricRows([metric], Data())
    batch = Batch(torch.zeros(1, 3, *mask.shape), torch.from_numpy(mask)[None], ["04"])
    for _ in range(images):
        rows.add(batch, torch.from_numpy(ids)[None], torch.zeros(1, CLASSES, 1, 1))
    return rows


def add_scores(metric, *sides, images=1):
    """Return the scores of a metric in an evaluation."""
    result = {"classes": []}
    rows_of(metric, *sides, images=images).add_scores(result, list)
    return result


def add_layer_scores(metric):
    return add_scores(LayerMetric(metric), BLANK, BLANK)


OUTSIDE = "share of Given is 7, outside 0..1. Name it in `unbounded`"
INFINITE = ("share of Given is inf", "share_infinite_images", "`totals`")
OTHER_COUNTS = ("of Given returns counts of ", " for the image 01, and of ", " for 00")
OTHER_LAYERS = ("of Given returns counts of ", " for the image 04 (layer 1)")
OTHER_SCORES = "Given returns"

test_message_names_metric_and_image = refusals(
    {
        "a score above 1": (lambda: add_scores(Given(share=7.0)), OUTSIDE),
        # errors of layers name the metric of a layer
        "a score of layers above 1": (lambda: add_layer_scores(Given(share=np.full(CLASSES, 7.0))), OUTSIDE),
        "more below 0 than rounding": (lambda: add_scores(Given(share=-1e-6)), "outside 0..1"),
        "more above 1 than rounding": (lambda: add_scores(Given(share=1 + 1e-6)), "outside 0..1"),
        "an infinite score": (lambda: add_scores(Given(share=np.inf, unbounded=("share",))), *INFINITE),
        "counts of NaN": (lambda: rows_of(Given({"correct": np.nan})), "of Given returns correct=nan for the image 04"),
        "counts of None": (lambda: rows_of(Given({"correct": None})), "of Given returns correct of type object"),
        "counts of text": (lambda: rows_of(Given({"correct": "1"})), "returns correct of type <U1"),
        "complex counts": (lambda: rows_of(Given({"correct": 1j})), "correct of type complex128. Return integers"),
        "infinite counts": (lambda: rows_of(Given({"correct": np.inf})), "correct=inf for", "Return 0 in all counts"),
        "counts of other names": (lambda: add_scores(Given(COUNTS, {"right": 1}), images=2), *OTHER_COUNTS),
        "counts of other shapes": (lambda: add_scores(Given(COUNTS, {"correct": [1]}), images=2), *OTHER_COUNTS),
        "no scores": (lambda: add_scores(Given()), OTHER_SCORES),
        "no scores of layers": (lambda: add_layer_scores(Given()), OTHER_SCORES),
        "more scores": (lambda: add_scores(Given(share=1.0, miou=1.0)), OTHER_SCORES),
        "scores of classes": (lambda: add_scores(Given(share=[0.5, 0.5])), OTHER_SCORES),
    }
)


def test_unbounded_scores_and_rounding_are_accepted():
    assert add_scores(Given(share=7.0, unbounded=("share",)))["share"] == 7
    assert [add_scores(Given(share=share))["share"] for share in (-1e-12, 1 + 1e-12)] == [-1e-12, 1 + 1e-12]


@pytest.mark.parametrize(("value", "total"), [(np.uint8(200), 800), (np.True_, 4), (np.float16(60000), 240000.0)])
def test_sums_of_narrow_counts_do_not_overflow(value, total):
    found = sum_counts([{"pixels": value}] * 4)["pixels"]
    assert found == total and found.dtype in (np.int64, np.float64)


class AreaError(RowMetric):
    """Mean difference of the pixels of class 1, from one number for each image."""

    scores = {"area_error": "min"}
    unbounded = ("area_error",)

    def count(self, prediction, sample):
        return {"found": (prediction.ids == 1).sum(), "held": (sample.mask == 1).sum()}

    def score_rows(self, rows):
        found, held = (np.array([row[name] for row in rows]) for name in ("found", "held"))
        return {"area_error": np.abs(found - held).mean()}


def test_rows_keep_their_types_and_may_be_single_numbers():
    metric = AreaError()
    rows = MetricRows([metric], Data())
    for pixels in (3, 40):
        mask = torch.zeros(1, 8, 8, dtype=torch.uint8)
        mask[0].flatten()[:pixels] = 1
        rows.add(Batch(torch.zeros(1, 3, 8, 8), mask, ["x"]), torch.zeros_like(mask), torch.zeros(1, CLASSES, 8, 8))
    result = {"classes": []}
    rows.add_scores(result, list)
    assert result["area_error"] == 21.5
    found = leave_units_out(metric, rows.counts[0], ["a", "b"])["area_error"]
    assert found.left_out == [40, 3] and all(found.scored)
    alone = leave_units_out(metric, rows.counts[0], ["a", "a"])["area_error"]
    assert alone.value == 21.5 and alone.left_out == [None]


def test_units_without_rows_are_not_scored():
    rows = [{"found": np.array(values), "held": np.array(values)} for values in ([1, 2], [], [])]
    metric = AreaError()
    metric.score_rows = lambda rows: {"area_error": np.concatenate([row["found"] for row in rows]).sum()}
    assert leave_units_out(metric, rows, ["a", "a", "b"])["area_error"].scored == [True, False]


def test_units_without_counts_are_not_scored():
    empty = {"classes": np.zeros((3, CLASSES), np.int64)}
    rows = [empty, {"classes": np.ones((3, CLASSES), np.int64)}, empty, empty]
    assert [*leave_units_out(MeanIoU(), rows, ["a", "b", "b", "c"])["miou"].scored] == [False, True, False]
