"""Metrics of other libraries: what they see of ignored pixels, and images of infinite or undefined value."""

import numpy as np
import pytest
import torch
from docs_pages import ROOT, blocks
from mistakes import refusals
from scipy.spatial.distance import cdist
from test_metric_contract import CLASSES, MeanError, score, ugly_case
from test_metric_rows import add_scores

from dinoseg.core.metric import LabelledImage, PredictedImage
from dinoseg.evaluation.unit_scores import leave_units_out, metric_intervals
from dinoseg.metrics.layers import LayerMetric
from dinoseg.metrics.wrapped import WrappedMetric
from dinoseg.testing import check_metric


class Hausdorff:
    """Hausdorff distance of the last class: nan if both sides lack it, infinite if one does.

    It has the form of torchmetrics, and refuses ids that are no class.
    """

    def __init__(self, num_classes=CLASSES):
        self.num_classes = num_classes

    def reset(self):
        self.sides = None

    def update(self, ids, mask):
        assert ids.dtype == mask.dtype == torch.int64
        self.sides = [torch.nn.functional.one_hot(side, self.num_classes).bool() for side in (ids, mask)]

    def compute(self):
        ids, mask = (np.argwhere(side[0, ..., -1].numpy()) for side in self.sides)
        if not len(ids) or not len(mask):
            return float("nan") if len(ids) == len(mask) else float("inf")
        distances = cdist(ids, mask)
        return max(distances.min(0).max(), distances.min(1).max())


def hausdorff(num_classes=CLASSES):
    return WrappedMetric("hausdorff", Hausdorff(num_classes), "min", is_share=False, ignored="match")


def object_at(column, classes=CLASSES):
    ids = np.zeros((6, 12), np.uint8)
    if column is not None:
        ids[2, column] = classes - 1
    return ids


def test_a_wrapped_metric_is_the_mean_over_images():
    metric = WrappedMetric("error", MeanError(), "min", ignored="remove")
    assert metric.scores == {"error": "min"}
    images = [pair for seed in range(20) for pair in ugly_case(seed) if (pair[1] != 255).sum() > 1]
    images = [(np.where(mask == 255, 255, ids), mask) for ids, mask in images]  # what is removed may be no class
    expected = [(ids != mask)[mask != 255].mean() for ids, mask in images]
    one = (np.zeros((1, 1), np.uint8), np.ones((1, 1), np.uint8))
    assert score(metric, [*images, one])["error"] == pytest.approx(np.mean(expected), abs=1e-12)
    assert score(metric, [one])["error"] is None


def test_pixels_are_removed_or_matched_by_the_contract():
    check_metric(WrappedMetric("error", MeanError(), "min", ignored="remove"))
    check_metric(hausdorff(), CLASSES)
    with pytest.raises(AssertionError, match="must not count"):
        check_metric(WrappedMetric("error", MeanError(), "min", ignored="match"))


@pytest.mark.parametrize(("ignored_class", "matched"), [(255, 0), (0, 0), (1, 1)])
def test_matched_pixels_have_one_class_on_both_sides(ignored_class, matched):
    ids, mask = object_at(3), object_at(3)
    ids[:, 8:], mask[:, 8:] = CLASSES - 1, ignored_class
    seen = []

    class Recorder(Hausdorff):
        def update(self, ids, mask):
            seen.extend([ids, mask])
            super().update(ids, mask)

    metric = WrappedMetric("hausdorff", Recorder(), "min", is_share=False, ignored="match")
    assert score(metric, [(ids, mask)], ignored=ignored_class)["hausdorff"] == 0.0
    assert all((side[0, :, 8:] == matched).all() and side.shape == (1, *ids.shape) for side in seen)


def test_a_missed_object_makes_the_mean_infinite():
    found, missed, absent = ((object_at(at), object_at(3)) for at in (5, None, 3))
    images = [found, missed, missed, (object_at(None),) * 2]
    expected = {"hausdorff": None, "hausdorff_infinite_images": 2.0, "hausdorff_finite_mean": 2.0}
    assert score(hausdorff(), images) == expected
    assert [*score(hausdorff(), [found, absent]).values()] == [1.0, 0.0, 1.0]
    assert set(score(hausdorff(), images[3:]).values()) == {None, 0.0}
    result = add_scores(hausdorff(), *missed)
    assert result["hausdorff"] is None and result["hausdorff_infinite_images"] == 1


def test_infinite_layers_are_added_up_over_classes():
    masks = np.stack([object_at(3, 2), object_at(None), object_at(3, 2)])
    ids = np.stack([object_at(None), object_at(3, 2), object_at(5, 2)])
    metric = LayerMetric(hausdorff(2))
    counts = metric.count(PredictedImage(ids), LabelledImage(masks, 3))
    expected = {"hausdorff": None, "hausdorff_infinite_images": 4.0, "hausdorff_finite_mean": 2.0}
    assert metric.score([counts, counts]) == expected


def test_an_infinite_score_has_no_interval():
    images = [(object_at(at), object_at(3)) for at in (5, None, 3, 7)]
    rows = [hausdorff().count(PredictedImage(ids), LabelledImage(mask, CLASSES)) for ids, mask in images]
    intervals = metric_intervals(hausdorff(), leave_units_out(hausdorff(), rows, [*"abcd"]))
    assert intervals["hausdorff"] is None and "hausdorff_infinite_images" not in intervals
    low, high = intervals["hausdorff_finite_mean"]
    assert low < 2 < high


@pytest.mark.heavy  # imports MONAI
@pytest.mark.filterwarnings("ignore")
def test_distance_of_the_docs_equals_the_reference():
    pytest.importorskip("monai.metrics")
    (text,) = (text for _, text in blocks(ROOT / "docs/extending.md", "text") if "class Hausdorff" in text)
    names = {}
    exec(text, names)
    metric = WrappedMetric("hausdorff", names["Hausdorff"](2), "min", is_share=False, ignored="match")
    for seed in range(20):
        images = [((ids == 1).astype(np.uint8), np.where(mask == 255, 255, mask == 1)) for ids, mask in ugly_case(seed)]
        assert score(metric, images) == pytest.approx(score(hausdorff(2), images)), seed


def count_outsider():
    ids = object_at(3)
    ids[0, 0] = CLASSES
    hausdorff().count(PredictedImage(ids), LabelledImage(object_at(3), CLASSES, name="x"))


def wrap(*better, **options):
    return WrappedMetric("hausdorff", Hausdorff(), *better, ignored="match", **options)


MISSED = (object_at(None), object_at(3))

test_message_names_the_setting_to_change = refusals(
    {
        "infinite as the best": (
            lambda: score(wrap(is_share=False), [MISSED]),
            "is inf",
            "better=max",
            "set better=min",
        ),
        "an infinite share": (lambda: add_scores(wrap("min"), *MISSED), "outside 0..1", "is_share=false"),
        "predictions of no class": (count_outsider, "x: ", f" holds {CLASSES}", f"0..{CLASSES - 1}"),
    }
)
