"""Scores of tensors: equal to independent counts, and to those of the evaluation."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from mistakes import assert_refused
from sklearn.metrics import accuracy_score, f1_score, jaccard_score

from dinoseg import metrics
from dinoseg.metrics import calibration
from dinoseg.metrics.region_boundary import object_scores


@pytest.fixture
def ids():
    rng = torch.Generator().manual_seed(0)
    targets, predictions = (torch.randint(0, 3, (2, 8, 9), generator=rng) for _ in range(2))
    targets[:, :2] = 255
    return predictions, targets


def test_overlaps_are_those_of_another_library(ids):
    predictions, targets = ids
    known = targets != 255
    ours = predictions[known].numpy()
    theirs = targets[known].numpy()
    assert metrics.mean_iou(*ids, 3) == pytest.approx(jaccard_score(theirs, ours, average="macro"))
    assert metrics.mean_dice(*ids, 3) == pytest.approx(f1_score(theirs, ours, average="macro"))
    assert metrics.pixel_accuracy(*ids, 3) == pytest.approx(accuracy_score(theirs, ours))
    assert metrics.mean_iou(predictions[0].to(torch.uint8), targets[0].to(torch.uint8), 3) > 0
    assert math.isnan(metrics.mean_iou(predictions, torch.full_like(targets, 255), 3))


def test_shapes_of_objects_are_scored_as_in_davis():
    rng = np.random.default_rng(0)
    target, prediction = (rng.integers(0, 3, (20, 30)).astype(np.uint8) for _ in range(2))
    ours = metrics.region_and_boundary(torch.from_numpy(prediction), torch.from_numpy(target), 2)
    theirs = object_scores(target, prediction, 2)
    assert all(
        (mine.numpy() == other).all() and mine.dtype == torch.float64 for mine, other in zip(ours, theirs, strict=True)
    )


def test_outlines_are_scored_by_class():
    target = torch.zeros(32, 32, dtype=torch.uint8)
    target[8:24, 8:24] = 1
    moved = target.roll(2, 0)
    near = metrics.surface_dice(moved, target, 3, tolerance=2.0)
    far = metrics.surface_dice(moved, target, 3, tolerance=0.0)
    assert near[:2].tolist() == [1, 1] and 0 < far[1] < 1 and near[2].isnan()
    scores = metrics.boundary_iou(moved, target, 3)
    assert 0 < scores[1] < 1 and scores[2].isnan() and metrics.boundary_iou(target, target, 2).tolist() == [1, 1]


def test_calibration_leaves_out_ignored_pixels():
    rng = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, 3, 16, 16, generator=rng)
    shares = (logits / 2).softmax(1)
    targets = torch.multinomial(shares.movedim(1, -1).reshape(-1, 3), 1, generator=rng).view(2, 16, 16)
    targets[:, 0] = 255
    known = targets != 255
    pixels = logits.movedim(1, -1)[known].numpy(), targets[known].numpy()
    expected = calibration.reliability(*pixels).ece
    assert metrics.expected_calibration_error(logits, targets) == pytest.approx(expected)
    best = metrics.fit_temperature(logits, targets)
    assert 1.4 < best < 2.8
    assert metrics.expected_calibration_error(logits, targets, temperature=best) < expected
    assert math.isnan(metrics.expected_calibration_error(logits, torch.full_like(targets, 255)))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64])
def test_void_pixels_of_any_dtype_are_background(dtype):
    ids = torch.zeros(16, 16, dtype=torch.uint8)
    ids[4:12, 4:12] = 1
    shifted = ids.roll(2, 0)
    void = torch.zeros(16, 16, dtype=torch.bool)
    void[:6] = True
    expected = metrics.region_and_boundary(shifted * ~void, ids * ~void, 1)
    assert metrics.region_and_boundary(shifted, ids, 1, void=void.to(dtype)) == expected
    assert expected[0].item() < 1


def test_arrays_count_as_tensors(ids):
    arrays = [np.flip(each.numpy(), -1) for each in ids]
    for each in arrays:
        each.setflags(write=False)  # as arrays of Pillow images
    flipped = [each.flip(-1) for each in ids]
    for mixed in (arrays, [arrays[0], flipped[1]], [flipped[0], arrays[1]]):
        matrix = metrics.ConfusionMatrix(3)
        matrix.update(*mixed)
        assert matrix.compute()["miou"] == metrics.mean_iou(*mixed, 3) == metrics.mean_iou(*flipped, 3)
    square = torch.randint(2, (16, 16), dtype=torch.uint8)
    logits = torch.randn(1, 2, 16, 16)
    for call in (
        lambda change: metrics.region_and_boundary(change(square), change(square), 1, void=change(square)),
        lambda change: metrics.boundary_iou(change(square), square, 2),
        lambda change: metrics.surface_dice(square, change(square), 2, tolerance=1.0),
        lambda change: metrics.expected_calibration_error(change(logits), change(square[None])),
    ):
        assert str(call(torch.Tensor.numpy)) == str(call(lambda each: each))


@pytest.mark.parametrize("kind", [">u2", "uint16", "bool"])
def test_arrays_of_any_byte_order_are_scored(kind):
    ids = np.array([[0, 1], [1, 0]], dtype=kind)
    assert metrics.boundary_iou(ids, ids, 2).tolist() == [1, 1]


@pytest.mark.parametrize("logit", [math.inf, -math.inf])
def test_infinite_logits_that_decide_a_score_are_refused(logit):
    logits = torch.zeros(1, 2, 1, 3)
    targets = torch.tensor([[[0, 1, 255]]])
    logits[:, :, 0, 2] = math.nan  # of an ignored pixel
    assert metrics.expected_calibration_error(logits, targets) == 0
    assert math.isfinite(metrics.fit_temperature(logits, targets))
    logits[0, :, 0, 0] = logit
    for function in (metrics.expected_calibration_error, metrics.fit_temperature):
        assert_refused(partial(function, logits, targets), "NaN or infinite")


def test_probability_0_of_a_class_has_no_temperature():
    logits = torch.zeros(1, 3, 1, 2)
    targets = torch.tensor([[[0, 2]]])
    logits[0, 2] = -math.inf
    assert metrics.expected_calibration_error(logits, targets) == 0
    assert_refused(lambda: metrics.fit_temperature(logits, targets), "probability 0")


def draw_pixels(count=2000, classes=4, sharp=1.0, seed=0):
    """Logits of which labels are drawn, then sharpened: the temperature that undoes it is `sharp`."""
    draw = np.random.default_rng(seed)
    logits = draw.normal(0, 2, (count, classes))
    chance = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels = (chance.cumsum(axis=1) > draw.random((count, 1))).argmax(axis=1)
    return (sharp * logits).astype(np.float32), labels


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_likelihood_is_torchs_cross_entropy(temperature):
    logits, labels = draw_pixels()
    scaled = torch.from_numpy(logits).double() / temperature
    expected = torch.nn.functional.cross_entropy(scaled, torch.from_numpy(labels)).item()
    assert calibration.negative_log_likelihood(logits, labels, temperature) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("sharp", [0.25, 1.0, 6.0])
def test_temperature_undoes_sharpening(sharp):
    logits, labels = draw_pixels(10_000, sharp=sharp)
    found = calibration.fit_temperature(logits, labels)
    assert found == pytest.approx(sharp, rel=0.05)
    grid = [calibration.negative_log_likelihood(logits, labels, found * factor) for factor in (0.97, 1.0, 1.03)]
    assert min(grid) == grid[1]


def test_reliability_is_that_of_a_loop():
    logits, labels = draw_pixels(500)
    found = calibration.reliability(logits, labels, 2.0)
    chance = torch.from_numpy(logits).double().div(2).softmax(dim=1).numpy()
    ece = 0.0
    for place in range(calibration.BINS):
        low, high = place / calibration.BINS, (place + 1) / calibration.BINS
        inside = [row for row in range(500) if low < chance[row].max() <= high]
        right = sum(chance[row].argmax() == labels[row] for row in inside)
        assert (found.pixels[place], found.correct[place]) == (len(inside), right)
        ece += abs(right - sum(chance[row].max() for row in inside)) / 500
    assert found.ece == pytest.approx(ece)


def test_extreme_and_empty_logits_are_scored():
    sure = np.array([[1e4, -1e4], [-1e4, 1e4]], np.float32)
    assert calibration.reliability(sure, np.array([0, 1])).ece == 0
    assert math.isfinite(calibration.negative_log_likelihood(sure, np.array([1, 0])))
    assert calibration.reliability(np.zeros((0, 3)), np.zeros(0, int)).ece is None
    assert 0.0099 < calibration.fit_temperature(sure, np.array([0, 1])) < 101
