import math

import numpy as np
import pytest
import torch

from dinoseg.metrics.calibration import BINS, fit_temperature, negative_log_likelihood, reliability


def pixels(count=2000, classes=4, sharp=1.0, seed=0):
    """Logits of which labels are drawn, then sharpened: the temperature that undoes it is `sharp`."""
    draw = np.random.default_rng(seed)
    logits = draw.normal(0, 2, (count, classes))
    chance = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels = (chance.cumsum(axis=1) > draw.random((count, 1))).argmax(axis=1)
    return (sharp * logits).astype(np.float32), labels


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_likelihood_is_torchs_cross_entropy(temperature):
    logits, labels = pixels()
    scaled = torch.from_numpy(logits).double() / temperature
    expected = torch.nn.functional.cross_entropy(scaled, torch.from_numpy(labels)).item()
    assert negative_log_likelihood(logits, labels, temperature) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("sharp", [0.25, 1.0, 6.0])
def test_temperature_undoes_sharpening(sharp):
    logits, labels = pixels(20_000, sharp=sharp)
    found = fit_temperature(logits, labels)
    assert found == pytest.approx(sharp, rel=0.05)
    grid = [negative_log_likelihood(logits, labels, found * factor) for factor in (0.97, 1.0, 1.03)]
    assert min(grid) == grid[1]


def test_reliability_is_that_of_a_loop():
    logits, labels = pixels(500)
    found = reliability(logits, labels, 2.0)
    chance = torch.from_numpy(logits).double().div(2).softmax(dim=1).numpy()
    ece = 0.0
    for place in range(BINS):
        low, high = place / BINS, (place + 1) / BINS
        inside = [row for row in range(500) if low < chance[row].max() <= high]
        right = sum(chance[row].argmax() == labels[row] for row in inside)
        assert (found.pixels[place], found.correct[place]) == (len(inside), right)
        ece += abs(right - sum(chance[row].max() for row in inside)) / 500
    assert found.ece == pytest.approx(ece)


def test_extreme_and_empty_logits_are_scored():
    sure = np.array([[1e4, -1e4], [-1e4, 1e4]], np.float32)
    assert reliability(sure, np.array([0, 1])).ece == 0
    assert math.isfinite(negative_log_likelihood(sure, np.array([1, 0])))
    assert reliability(np.zeros((0, 3)), np.zeros(0, int)).ece is None
    assert 0.0099 < fit_temperature(sure, np.array([0, 1])) < 101
    for logits in (np.zeros((0, 3)), np.zeros((4, 1))):
        with pytest.raises(ValueError, match="two classes"):
            fit_temperature(logits, np.zeros(len(logits), int))
