"""Tasks: probabilities, decisions and predictions of one class per pixel, and of layers."""

import numpy as np
import pytest
import torch

from dinoseg.core.geometry import upsample
from dinoseg.core.shapes import Prediction
from dinoseg.core.task import SEMANTIC, Multilabel
from dinoseg.utils.errors import UserError

TASKS = [SEMANTIC, Multilabel(3)]


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
        decided = Multilabel(3, threshold).decide(scores.sigmoid())
        assert decided.dtype == torch.uint8
        np.testing.assert_array_equal(decided, shares >= np.array(expected)[:, None, None])


@pytest.mark.parametrize("threshold", [0.0, 1.0, [0.5], [0.5, 0.5, 2.0], "half"])
def test_wrong_thresholds_are_refused(threshold):
    with pytest.raises(UserError, match="threshold"):
        Multilabel(3, threshold)


def test_predictions_of_layers_agree_at_any_size():
    grid = logits(2)
    whole = Prediction(grid, (20, 24), (1.0, 1.0), upsample, grid=grid, task=Multilabel(3))
    layers, sampled = whole.class_ids_and_logits((slice(0, None, 4), slice(0, None, 4)))
    assert layers.shape == (2, 3, 20, 24)
    torch.testing.assert_close(layers, (upsample(grid, (20, 24), (1.0, 1.0)) >= 0).to(torch.uint8))
    torch.testing.assert_close(sampled, whole.logits()[:, :, ::4, ::4])
    averaged = Prediction(whole.probabilities(), (20, 24), (1.0, 1.0), upsample, mixture=True, task=Multilabel(3))
    torch.testing.assert_close(averaged.probabilities(), whole.probabilities(), rtol=1e-5, atol=1e-6)
