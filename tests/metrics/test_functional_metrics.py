"""Scores of tensors: equal to independent counts, and to those of the evaluation."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, jaccard_score

import dinoseg
from dinoseg import metrics
from dinoseg.metrics.region_boundary import object_scores
from dinoseg.utils.errors import UserError


@pytest.fixture
def ids():
    rng = torch.Generator().manual_seed(0)
    targets, predictions = (torch.randint(0, 3, (2, 8, 9), generator=rng) for _ in range(2))
    targets[:, :2] = 255
    return predictions, targets


def test_overlaps_are_those_of_another_library(ids):
    predictions, targets = ids
    known = targets != 255
    ours, theirs = predictions[known].numpy(), targets[known].numpy()
    assert metrics.mean_iou(*ids, 3) == pytest.approx(jaccard_score(theirs, ours, average="macro"))
    assert metrics.mean_dice(*ids, 3) == pytest.approx(f1_score(theirs, ours, average="macro"))
    assert metrics.pixel_accuracy(*ids, 3) == pytest.approx(accuracy_score(theirs, ours))
    assert metrics.mean_iou(predictions[0].to(torch.uint8), targets[0].to(torch.uint8), 3) > 0
    assert math.isnan(metrics.mean_iou(predictions, torch.full_like(targets, 255), 3))


def test_a_matrix_adds_up_over_batches(ids):
    whole, parts = metrics.ConfusionMatrix(3), [metrics.ConfusionMatrix(3) for _ in range(2)]
    whole.update(*ids)
    for part, prediction, target in zip(parts, *ids, strict=True):
        part.update(prediction, target)
    parts[0].merge(parts[1])
    assert parts[0].compute() == whole.compute() and whole.compute()["miou"] == metrics.mean_iou(*ids, 3)
    whole.reset()
    assert whole.compute()["pixels"] == 0


def test_shapes_of_objects_are_scored_as_in_davis():
    rng = np.random.default_rng(0)
    target, prediction = (rng.integers(0, 3, (20, 30)).astype(np.uint8) for _ in range(2))
    ours = metrics.region_and_boundary(torch.from_numpy(prediction), torch.from_numpy(target), 2)
    theirs = object_scores(target, prediction, 2)
    assert all(
        (mine.numpy() == other).all() and mine.dtype == torch.float64 for mine, other in zip(ours, theirs, strict=True)
    )
    hidden = torch.ones(20, 30, dtype=torch.bool)
    nothing = metrics.region_and_boundary(torch.from_numpy(prediction), torch.from_numpy(target), 2, void=hidden)
    assert all((part == 1).all() for part in nothing)


def test_outlines_are_scored_by_class():
    target = torch.zeros(32, 32, dtype=torch.uint8)
    target[8:24, 8:24] = 1
    moved = target.roll(2, 0)
    near = metrics.surface_dice(moved, target, 3, tolerance=2.0)
    far = metrics.surface_dice(moved, target, 3, tolerance=0.0)
    assert near[:2].tolist() == [1, 1] and 0 < far[1] < 1 and near[2].isnan()
    scores = metrics.boundary_iou(moved, target, 3)
    assert 0 < scores[1] < 1 and scores[2].isnan() and metrics.boundary_iou(target, target, 2).tolist() == [1, 1]


def test_calibration_is_that_of_its_definition():
    rng = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, 3, 16, 16, generator=rng)
    shares = (logits / 2).softmax(1)
    targets = torch.multinomial(shares.movedim(1, -1).reshape(-1, 3), 1, generator=rng).view(2, 16, 16)
    targets[:, 0] = 255
    known = targets != 255
    confidence, chosen = logits.double().softmax(1).max(1)
    correct, bins = (chosen == targets)[known].double(), (confidence[known] * 15).ceil() - 1
    gaps = [(correct - confidence[known])[bins == index].sum().abs() for index in range(15)]
    expected = float(sum(gaps) / known.sum())
    assert metrics.expected_calibration_error(logits, targets) == pytest.approx(expected)
    best = metrics.fit_temperature(logits, targets)
    assert 1.4 < best < 2.8
    assert metrics.expected_calibration_error(logits, targets, temperature=best) < expected
    assert math.isnan(metrics.expected_calibration_error(logits, torch.full_like(targets, 255)))


def test_mistakes_are_refused(ids):
    with pytest.raises(UserError, match="do not fit"):
        metrics.expected_calibration_error(torch.zeros(1, 2, 4, 4), torch.zeros(1, 5, 4).long())
    with pytest.raises(UserError, match="Some targets are not classes: give ids below 2, or 255"):
        metrics.fit_temperature(torch.zeros(1, 2, 2, 2), torch.full((1, 2, 2), 7))
    with pytest.raises(UserError, match="outside 0..1"):
        metrics.mean_iou(*ids, 2)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64])
def test_void_pixels_of_any_dtype_are_background(dtype):
    ids = torch.zeros(16, 16, dtype=torch.uint8)
    ids[4:12, 4:12] = 1
    shifted, void = ids.roll(2, 0), torch.zeros(16, 16, dtype=torch.bool)
    void[:6] = True
    expected = dinoseg.metrics.region_and_boundary(shifted * ~void, ids * ~void, 1)
    assert dinoseg.metrics.region_and_boundary(shifted, ids, 1, void=void.to(dtype)) == expected
    assert expected[0].item() < 1
    with pytest.raises(ValueError, match=r"void has the shape \[1, 16\]"):
        dinoseg.metrics.region_and_boundary(ids, ids, 1, void=void[:1])


def test_refused_pixels_are_not_counted():
    matrix, ids = dinoseg.metrics.ConfusionMatrix(3), torch.zeros(1, 4, 4, dtype=torch.uint8)
    for dtype in (torch.uint8, torch.int32):
        with pytest.raises(UserError, match="16 mask pixels hold ids outside 0..2"):
            matrix.update(ids, torch.full((1, 4, 4), 7, dtype=dtype))
    matrix.update(ids, ids.to(torch.uint16))
    assert matrix.compute()["accuracy"] == 1 and matrix.compute()["pixels"] == 16


def test_arrays_count_as_tensors(ids):
    arrays = [np.flip(each.numpy(), -1) for each in ids]
    for each in arrays:
        each.setflags(write=False)  # as arrays of Pillow images
    flipped = [each.flip(-1) for each in ids]
    for mixed in (arrays, [arrays[0], flipped[1]], [flipped[0], arrays[1]]):
        matrix = metrics.ConfusionMatrix(3)
        matrix.update(*mixed)
        assert matrix.compute()["miou"] == metrics.mean_iou(*mixed, 3) == metrics.mean_iou(*flipped, 3)
    square, logits = torch.randint(2, (16, 16), dtype=torch.uint8), torch.randn(1, 2, 16, 16)
    for call in (
        lambda change: metrics.region_and_boundary(change(square), change(square), 1, void=change(square)),
        lambda change: metrics.boundary_iou(change(square), square, 2),
        lambda change: metrics.surface_dice(square, change(square), 2, tolerance=1.0),
        lambda change: metrics.expected_calibration_error(change(logits), change(square[None])),
    ):
        assert str(call(torch.Tensor.numpy)) == str(call(lambda each: each))


def test_arguments_of_other_types_are_refused(ids):
    square, logits = torch.zeros(4, 4, dtype=torch.uint8), torch.zeros(1, 2, 4, 4)
    for call in (
        lambda: metrics.mean_iou([[0, 1]], ids[1], 3),
        lambda: metrics.ConfusionMatrix(3).update(ids[0], None),
        lambda: metrics.fit_temperature([logits], square[None]),
    ):
        with pytest.raises(UserError, match="is of type (list|NoneType). Give a tensor or an array"):
            call()
    for call in (
        lambda: metrics.boundary_iou(square.float(), square, 1),
        lambda: metrics.surface_dice(square, square.double(), 1, tolerance=1.0),
        lambda: metrics.region_and_boundary(square.half(), square, 1),
        lambda: metrics.expected_calibration_error(logits, square[None].float()),
    ):
        with pytest.raises(UserError, match="is torch.float.*. Give ids of an integer type"):
            call()


def test_numbers_out_of_range_are_refused():
    square, logits = torch.zeros(4, 4, dtype=torch.uint8), torch.zeros(1, 2, 4, 4)
    for temperature in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(UserError, match="^temperature=.*: give a number above 0"):
            metrics.expected_calibration_error(logits, square[None], temperature=temperature)
    for ratio in (-1, 0.0, math.nan, 1.1):
        with pytest.raises(UserError, match="^ratio=.*: give a number above 0 and at most 1"):
            metrics.boundary_iou(square, square, 1, ratio=ratio)
    for count in (0, True, 2.0):
        for call in (metrics.boundary_iou, metrics.region_and_boundary):
            with pytest.raises(UserError, match=f"^num_.*={count}: give a whole number of at least 1"):
                call(square, square, count)


def test_logits_that_are_nan_are_refused_where_a_pixel_counts():
    logits, targets = torch.zeros(1, 2, 4, 4), torch.zeros(1, 4, 4, dtype=torch.uint8)
    logits[:, :, 0], targets[:, 1] = math.nan, 1
    for call in (metrics.expected_calibration_error, metrics.fit_temperature):
        with pytest.raises(UserError, match="Some logits of labelled pixels are NaN"):
            call(logits, targets)
        targets[:, 0] = 255
        assert math.isfinite(call(logits, targets))
        targets[:, 0] = 0


@pytest.mark.parametrize("kind", [">u2", "uint16", "bool"])
def test_arrays_of_any_byte_order_are_scored(kind):
    ids = np.array([[0, 1], [1, 0]], dtype=kind)
    assert metrics.boundary_iou(ids, ids, 2).tolist() == [1, 1]


@pytest.mark.parametrize(
    "ids", [np.ma.array([[0, 1]], mask=[[True, False]]), np.array([[0, 1]], object), np.array([["a"]])]
)
def test_masked_arrays_and_objects_are_refused(ids):
    with pytest.raises(UserError, match=r"prediction is .*array"):
        metrics.mean_iou(ids, np.array([[0, 1]]), 2)


@pytest.mark.parametrize("logit", [math.inf, -math.inf])
def test_infinite_logits_that_decide_a_score_are_refused(logit):
    logits, targets = torch.zeros(1, 2, 1, 3), torch.tensor([[[0, 1, 255]]])
    logits[:, :, 0, 2] = math.nan  # of an ignored pixel
    assert metrics.expected_calibration_error(logits, targets) == 0
    logits[0, :, 0, 0] = logit
    for function in (metrics.expected_calibration_error, metrics.fit_temperature):
        with pytest.raises(UserError, match="NaN or infinite"):
            function(logits, targets)


def test_probability_0_of_a_class_has_no_temperature():
    logits, targets = torch.zeros(1, 3, 1, 2), torch.tensor([[[0, 2]]])
    logits[0, 2] = -math.inf
    assert metrics.expected_calibration_error(logits, targets) == 0
    with pytest.raises(UserError, match="probability 0"):
        metrics.fit_temperature(logits, targets)


def test_logits_of_one_class_have_no_calibration():
    for function in (metrics.expected_calibration_error, metrics.fit_temperature):
        with pytest.raises(UserError, match="two classes"):
            function(torch.randn(1, 1, 4, 4), torch.zeros(1, 4, 4, dtype=torch.uint8))
