"""Soft clDice against loops over pixels in float64, written from the paper's algorithms."""

import itertools
from dataclasses import replace

import pytest
import torch
from test_overlap import MASKS, WEIGHTS, make, random_mask

from dinoseg.core.shapes import Batch
from dinoseg.losses import cldice
from dinoseg.losses.cldice import SoftClDice

CROSS = ((0, 0), (0, 1), (0, -1), (1, 0), (-1, 0))
SQUARE = tuple(itertools.product((-1, 0, 1), repeat=2))


def pool_neighbours(values, places, extreme):
    """Return the minimum or maximum over the neighbours of each pixel that are in the image."""
    return {
        (y, x): extreme(values[y + dy, x + dx] for dy, dx in places if (y + dy, x + dx) in values) for y, x in values
    }


def skeleton_by_hand(values, iterations):
    skeleton = dict.fromkeys(values, 0.0)
    for _ in range(iterations + 1):
        eroded = pool_neighbours(values, CROSS, min)
        opened = pool_neighbours(eroded, SQUARE, max)
        for place, value in values.items():
            removed = max(value - opened[place], 0.0)
            skeleton[place] += max(removed - skeleton[place] * removed, 0.0)
        values = eroded
    return skeleton


def cldice_by_hand(prediction, mask, iterations, classes):
    shares = prediction.logits(tuple(mask.shape[1:])).detach().double().softmax(1)
    places = list(itertools.product(range(mask.shape[1]), range(mask.shape[2])))
    total = norm = 0.0
    for k in classes:
        sums = [0.0] * 4
        for image, ids in enumerate(mask.tolist()):
            soft = {(y, x): shares[image, k, y, x].item() * (ids[y][x] != 255) for y, x in places}
            hard = {(y, x): float(ids[y][x] == k) for y, x in places}
            of_soft, of_hard = skeleton_by_hand(soft, iterations), skeleton_by_hand(hard, iterations)
            sums[0] += sum(of_soft[place] * hard[place] for place in places)
            sums[1] += sum(of_soft.values())
            sums[2] += sum(of_hard[place] * soft[place] for place in places)
            sums[3] += sum(of_hard.values())
        if k not in mask.unique():
            continue
        precision, sensitivity = (sums[0] + 1) / (sums[1] + 1), (sums[2] + 1) / (sums[3] + 1)
        total += WEIGHTS[k].item() * (1 - 2 * precision * sensitivity / (precision + sensitivity))
        norm += WEIGHTS[k].item()
    return total / norm if norm else 0.0


@pytest.mark.parametrize(
    ("name", "iterations", "classes"),
    [*((name, 3, None) for name in MASKS), *((name, 1, [0, 3]) for name in ("many", "two classes", "one class"))],
)
def test_soft_cldice_equals_plain_loops(name, iterations, classes):
    prediction, batch = make(MASKS[name])
    if iterations == 3:
        prediction = replace(prediction, grid=prediction.outputs)
    loss = SoftClDice(WEIGHTS, iterations=iterations, classes=classes)
    value, parts = loss(prediction, batch)
    expected = cldice_by_hand(prediction, MASKS[name], iterations, classes or [1, 2, 3])
    assert value.item() == pytest.approx(expected, abs=1e-12)
    assert parts["weight"] == sum(bool((ids != 255).any()) for ids in MASKS[name])


def bars():
    """Return images of a bar of 8 rows, whose skeleton depends on the fifth row below, at any position."""
    rows = torch.arange(64)[None, :, None] - torch.arange(8, 40)[:, None, None]
    return ((rows >= 0) & (rows < 8)).expand(32, 64, 16).to(torch.uint8)


@pytest.mark.parametrize("mask", [random_mask((2, 83, 61), 5), bars()], ids=["random", "bars"])
def test_bands_change_neither_value_nor_gradient(mask, monkeypatch):
    found = []
    for band in (2**30, 1):
        monkeypatch.setattr(cldice, "BAND", band)
        prediction, _ = make(mask, grid=(11, 8))
        prediction = replace(prediction, grid=prediction.outputs)
        value, _ = SoftClDice(WEIGHTS)(prediction, Batch(mask, mask, [""] * len(mask)))
        found.append((value, *torch.autograd.grad(value, prediction.outputs)))
    for whole, parts in zip(*found, strict=True):
        torch.testing.assert_close(whole, parts, rtol=1e-10, atol=1e-14)


def test_an_ignored_class_gives_no_loss():
    mask = MASKS["two classes"]
    prediction, _ = make(mask)
    hidden = torch.where(mask == 1, 255, mask)
    (value, _), (expected, _) = (
        SoftClDice(WEIGHTS, ignored, classes=classes)(prediction, Batch(ids, ids, [""] * len(ids)))
        for ids, ignored, classes in ((mask, 1, [0, 1, 2]), (hidden, 255, [0, 2]))
    )
    assert torch.equal(value, expected)


def test_half_precision_scores_are_computed_in_float32():
    prediction, batch = make(MASKS["two classes"])
    grid = prediction.outputs.detach().bfloat16()
    half, full = (replace(prediction, outputs=each, grid=each) for each in (grid, grid.float()))
    assert torch.equal(*(SoftClDice(WEIGHTS)(each, batch)[0] for each in (half, full)))
