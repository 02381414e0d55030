"""Metrics and counts of layers equal independent references of each layer, on random and ugly layers."""

import numpy as np
import pytest
import torch
from layer_images import CLASSES, draw_images, mean_surface_dice, sides_of
from score_making import boundary_iou, mean, overlap
from test_metric_contract import MeanError

from dinoseg.core.metric import LabelledImage, PredictedImage
from dinoseg.metrics import BoundaryIoU, CalibrationError, LayerMetric, SurfaceDice
from dinoseg.metrics.confusion import LayerCounts
from dinoseg.metrics.miou import MeanIoU
from dinoseg.metrics.wrapped import WrappedMetric


def score(metric, images):
    rows = [
        metric.count(PredictedImage(ids, logits), LabelledImage(mask, CLASSES, name="x"))
        for ids, mask, logits in images
    ]
    return metric.score(rows), metric.per_class({name: np.sum([row[name] for row in rows], axis=0) for name in rows[0]})


def calibration_error(images, layer):
    """Return the ECE of a layer over 15 bins of the greater of p and 1 - p, with p the sigmoid in float64."""
    confidence, correct = [], []
    for _, mask, logits in images:
        known = mask[layer] != 255
        share = 1 / (1 + np.exp(-logits[layer][known].astype(np.float64)))
        confidence += np.maximum(share, 1 - share).tolist()
        correct += ((share > 0.5) == (mask[layer][known] == 1)).tolist()
    confidence, correct = np.array(confidence), np.array(correct)
    if not len(confidence):
        return None
    bins = np.ceil(confidence * 15)
    gaps = [abs(correct[bins == each].sum() - confidence[bins == each].sum()) for each in np.unique(bins)]
    return sum(gaps) / len(confidence)


def mean_error(images, layer):
    """Return the share of wrong pixels, a mean over the images in which the layer has several labelled pixels."""
    sides = [(ids[layer], mask[layer], mask[layer] != 255) for ids, mask, _ in images]
    return mean((ids != mask)[known].mean() for ids, mask, known in sides if known.sum() > 1)


REFERENCES = {
    "boundary_iou": (BoundaryIoU(), lambda images, layer: boundary_iou(sides_of(images, layer))),
    "nsd": (SurfaceDice(), lambda images, layer: mean_surface_dice(sides_of(images, layer))),
    "ece": (CalibrationError(), calibration_error),
    "error": (WrappedMetric("error", MeanError(), "min", ignored="remove"), mean_error),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_scores_of_layers_equal_references(name):
    metric, reference = REFERENCES[name]
    for seed in range(40):
        images = draw_images(seed)
        found, by_class = score(LayerMetric(metric), images)
        expected = [reference(images, layer) for layer in range(CLASSES)]
        assert found[name] == pytest.approx(mean(expected), abs=1e-12), seed
        values = [np.nan if value is None else value for value in expected]
        np.testing.assert_allclose(by_class[name], values, atol=1e-12, err_msg=str(seed))


def test_scores_of_sums_are_vectorised():
    metric = LayerMetric(BoundaryIoU())
    images = draw_images(3)
    rows = [metric.count(PredictedImage(ids), LabelledImage(mask, CLASSES)) for ids, mask, _ in images]
    stacked = metric.compute({"bands": np.stack([row["bands"] for row in rows])})
    np.testing.assert_array_equal(stacked["boundary_iou"], [metric.compute(row)["boundary_iou"] for row in rows])


def test_settings_name_the_options_of_the_metric():
    one, other = (LayerMetric(BoundaryIoU(ratio)).settings for ratio in (0.02, 0.05))
    assert one != other and "BoundaryIoU" in one and "0.02" in one and one != BoundaryIoU(0.02).settings


@pytest.mark.parametrize("seed", range(4))
def test_counts_of_layers_equal_those_of_their_pixels(seed):
    images = draw_images(seed)
    counts = LayerCounts(CLASSES, background=0)
    for ids, mask, _ in images:
        counts.update(torch.from_numpy(ids), torch.from_numpy(mask))
    scores = counts.compute()
    expected = [overlap(sides_of(images, layer)) for layer in range(CLASSES)]
    for row, (iou, dice) in zip(scores["classes"], expected, strict=True):
        assert [row["iou"], row["dice"]] == pytest.approx([iou, dice])
    ious = [iou for iou, _ in expected]
    assert scores["miou"] == pytest.approx(mean(ious)) and scores["present_classes"] == CLASSES - ious.count(None)
    assert scores["miou_no_background"] == pytest.approx(mean(ious[1:]))
    right = np.concatenate([((ids == 1) == (mask == 1))[mask != 255] for ids, mask, _ in images])
    assert scores["accuracy"] == pytest.approx(right.mean())
    assert scores["ignored_pixels"] == sum((mask == 255).sum() for _, mask, _ in images)
    found = MeanIoU().score(
        [MeanIoU().count(PredictedImage(ids), LabelledImage(mask, CLASSES)) for ids, mask, _ in images]
    )
    assert found == pytest.approx({key: scores[key] for key in found})


def test_layers_without_any_class_have_no_score():
    counts = LayerCounts(1, background=None)
    counts.update(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2))
    assert counts.compute()["miou"] is None and counts.compute()["accuracy"] == 1
    assert LayerCounts(1).compute()["accuracy"] is None
