"""Tasks: probabilities, decisions and predictions of one class per pixel, and of layers."""

import numpy as np
import pytest
import torch
from mistakes import assert_refused

import dinoseg
from dinoseg.core.geometry import upsample
from dinoseg.core.shapes import Prediction
from dinoseg.core.task import SEMANTIC, MultilabelTask

TASKS = [SEMANTIC, MultilabelTask(3)]


def logits(seed=0, shape=(2, 3, 5, 6), scale=3.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("task", TASKS)
def test_logits_invert_probabilities(task):
    shares = task.probabilities(logits())
    torch.testing.assert_close(task.probabilities(task.logits(shares)), shares, rtol=1e-5, atol=1e-6)
    certain = torch.tensor([0.0, 1.0]).repeat(3, 1).view(1, 3, 1, 2)
    assert task.logits(certain).isfinite().all()


def test_layers_are_decided_by_a_threshold_for_each_class():
    scores = logits(1)
    shares = 1 / (1 + np.exp(-scores.double().numpy()))
    for threshold, expected in ((0.5, [0.5] * 3), ([0.1, 0.5, 0.9], [0.1, 0.5, 0.9])):
        decided = MultilabelTask(3, threshold).decide(scores.sigmoid())
        assert decided.dtype == torch.uint8
        np.testing.assert_array_equal(decided, shares >= np.array(expected)[:, None, None])
    assert MultilabelTask(1, 0.25).decide(torch.full((1, 1, 1, 1), 0.25)).item() == 1


@pytest.mark.parametrize("threshold", [0.0, 1.0, [0.5], [0.5, 0.5, 2.0], "half"])
def test_wrong_thresholds_are_refused(threshold):
    assert_refused(lambda: MultilabelTask(3, threshold), "threshold")


def test_predictions_of_layers_agree_at_any_size():
    grid = logits(2)
    whole = Prediction(grid, (20, 24), (1.0, 1.0), upsample, grid=grid, task=MultilabelTask(3))
    layers, sampled = whole.class_ids_and_logits((slice(0, None, 4), slice(0, None, 4)))
    assert layers.shape == (2, 3, 20, 24)
    torch.testing.assert_close(layers, (upsample(grid, (20, 24), (1.0, 1.0)) >= 0).to(torch.uint8))
    torch.testing.assert_close(sampled, whole.logits()[:, :, ::4, ::4])
    averaged = Prediction(whole.probabilities(), (20, 24), (1.0, 1.0), upsample, mixture=True, task=MultilabelTask(3))
    torch.testing.assert_close(averaged.probabilities(), whole.probabilities(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("task", TASKS)
def test_probabilities_are_float32(task, dtype):
    grid = logits(3).to(dtype)
    prediction = Prediction(grid, (20, 24), (1.0, 1.0), upsample, grid=grid, task=task)
    torch.testing.assert_close(prediction.probabilities(), task.probabilities(prediction.scores().float()))


def test_a_new_model_may_predict_a_single_class():
    model = dinoseg.create_model("rgb", classes=["leaf"], task={"name": "multilabel", "threshold": 0.3})
    found = model.eval().predict(np.zeros((16, 24, 3), np.uint8))
    assert found.mask.shape == (1, 16, 24) and found.mask.dtype == bool
    np.testing.assert_array_equal(found.mask, found.probabilities >= 0.3)
    assert_refused(lambda: dinoseg.create_model("rgb", classes=["leaf"]), "give 2 to 255")
