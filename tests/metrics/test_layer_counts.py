"""Counts of layers against numpy, class by class."""

import numpy as np
import pytest
import torch

from dinoseg.core.metric import LabelledImage, PredictedImage
from dinoseg.metrics.layer_counts import LayerCounts
from dinoseg.metrics.miou import MeanIoU


def draw(seed, shape=(3, 4, 9, 11)):
    rng = np.random.default_rng(seed)
    mask = rng.integers(0, 2, shape, dtype=np.uint8)
    mask[rng.random(shape) < 0.2] = 255
    mask[:, 1] = 0  # a class that no image shows
    prediction = rng.integers(0, 2, shape, dtype=np.uint8)
    prediction[:, 1] = 0
    return prediction, mask


def reference_scores(prediction, mask):
    """Return IoU and Dice of each class; None for one that neither side shows."""
    found = []
    for index in range(mask.shape[1]):
        known = mask[:, index] != 255
        ours, theirs = prediction[:, index][known] == 1, mask[:, index][known] == 1
        union = (ours | theirs).sum()
        both = (ours & theirs).sum()
        found.append((both / union, 2 * both / (ours.sum() + theirs.sum())) if union else (None, None))
    return found


@pytest.mark.parametrize("seed", range(3))
def test_iou_and_dice_equal_numpy(seed):
    prediction, mask = draw(seed)
    counts = LayerCounts(4)
    for one, other in zip(prediction, mask, strict=True):
        counts.update(torch.from_numpy(one), torch.from_numpy(other))
    scores, expected = counts.compute(), reference_scores(prediction, mask)
    for row, (iou, dice) in zip(scores["classes"], expected, strict=True):
        assert row["iou"] == (None if iou is None else pytest.approx(iou))
        assert row["dice"] == (None if dice is None else pytest.approx(dice))
    assert scores["miou"] == pytest.approx(np.mean([iou for iou, _ in expected if iou is not None]))
    assert scores["accuracy"] == pytest.approx((prediction == mask)[mask != 255].mean())
    assert scores["present_classes"] == 3 and scores["ignored_pixels"] == (mask == 255).sum()
    pairs = zip(prediction, mask, strict=True)
    rows = [MeanIoU().count(PredictedImage(found), LabelledImage(labels, 4)) for found, labels in pairs]
    found = MeanIoU().score(rows)
    assert {key: found[key] for key in found} == pytest.approx({key: scores[key] for key in found})


def test_layers_without_any_class_have_no_score():
    counts = LayerCounts(1, background=None)
    counts.update(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2))
    assert counts.compute()["miou"] is None and counts.compute()["accuracy"] == 1
    assert LayerCounts(1).compute()["accuracy"] is None
    with pytest.raises(ValueError, match="differ"):
        counts.update(torch.zeros(1, 2, 2), torch.zeros(1, 1, 2, 2))


def test_background_is_left_out_of_one_mean():
    prediction, mask = draw(4)
    counts = LayerCounts(4, background=0)
    counts.update(torch.from_numpy(prediction), torch.from_numpy(mask))
    scores = counts.compute()
    others = [row["iou"] for row in scores["classes"][1:] if row["iou"] is not None]
    assert scores["miou_no_background"] == pytest.approx(np.mean(others))
