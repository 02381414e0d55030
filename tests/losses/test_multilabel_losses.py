"""Binary cross-entropy and Dice of layers against torch and loops over classes, in float64."""

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from dinoseg.core.geometry import upsample
from dinoseg.core.shapes import Batch, Prediction
from dinoseg.core.task import MultilabelTask
from dinoseg.losses.multilabel import BinaryCrossEntropy, BinaryDice

WEIGHTS = torch.tensor([0.25, 1.0, 3.0])
IGNORED = 255


def make(seed, ignored=0.3, grid=(3, 4), size=(7, 9)):
    """Return a prediction of 3 classes for 2 images, and their layers."""
    rng = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(2, 3, *grid, dtype=torch.float64, generator=rng)
    mask = torch.randint(0, 2, (2, 3, *size), generator=rng, dtype=torch.uint8)
    mask[torch.rand(mask.shape, generator=rng) < ignored] = IGNORED
    logits.requires_grad_()
    prediction = Prediction(logits, size, (1.0, 1.0), upsample, task=MultilabelTask(3))
    return prediction, Batch(torch.zeros(2, 3, *size, dtype=torch.uint8), mask, ["a", "b"]), logits


@pytest.mark.parametrize("ignored", [0.0, 0.3, 0.95])
def test_bce_equals_torch_over_labelled_pixels(ignored):
    prediction, batch, logits = make(1, ignored)
    value, parts = BinaryCrossEntropy(WEIGHTS)(prediction, batch)
    scores = upsample(logits, (7, 9), (1.0, 1.0))
    total, weight = 0.0, 0.0
    for index, factor in enumerate(WEIGHTS.tolist()):
        layer = batch.mask[:, index]
        known = layer != IGNORED
        total += factor * binary_cross_entropy_with_logits(
            scores[:, index][known], layer[known].double(), reduction="sum"
        )
        weight += factor * int(known.sum())
    torch.testing.assert_close(value, total / weight)
    assert float(parts["weight"]) == pytest.approx(weight)
    assert float(BinaryCrossEntropy(WEIGHTS).divisors(batch)) == pytest.approx(weight)
    ours, theirs = (torch.autograd.grad(each, logits, retain_graph=True)[0] for each in (value, total / weight))
    torch.testing.assert_close(ours, theirs)


def test_dice_equals_a_loop_over_the_classes_that_occur():
    prediction, batch, logits = make(2)
    batch.mask[:, 1][batch.mask[:, 1] == 1] = 0  # a class that does not occur
    value, _ = BinaryDice(WEIGHTS)(prediction, batch)
    shares = upsample(logits, (7, 9), (1.0, 1.0)).sigmoid()
    costs = []
    for index in (0, 2):
        known = batch.mask[:, index] != IGNORED
        chosen, labels = shares[:, index][known], batch.mask[:, index][known].double()
        costs.append(WEIGHTS[index] * (1 - 2 * (chosen * labels).sum() / (chosen.sum() + labels.sum())))
    torch.testing.assert_close(value, torch.stack(costs).sum() / WEIGHTS[[0, 2]].sum())


@pytest.mark.parametrize("loss", [BinaryCrossEntropy, BinaryDice])
def test_half_precision_scores_are_computed_in_float32(loss):
    _, batch, logits = make(4, grid=(7, 9))
    half = logits.detach().bfloat16()
    values = [loss(WEIGHTS)(Prediction(each, (7, 9), (1.0, 1.0), upsample), batch)[0] for each in (half, half.float())]
    assert values[0].dtype == torch.float32 and torch.equal(*values)


@pytest.mark.parametrize("loss", [BinaryCrossEntropy, BinaryDice])
def test_ugly_batches_give_finite_losses(loss):
    prediction, batch, logits = make(3)
    for fill in (0, 1, IGNORED):
        batch.mask.fill_(fill)
        value, _ = loss(torch.ones(3))(prediction, batch)
        assert value.isfinite() and torch.autograd.grad(value, logits, retain_graph=True)[0].isfinite().all()
    batch.mask[0, 0, 0, 0] = 1
    extreme = Prediction(1000 * logits, (7, 9), (1.0, 1.0), upsample)
    assert loss(torch.ones(3))(extreme, batch)[0].isfinite()
    single = Prediction(logits[:, :1], (7, 9), (1.0, 1.0), upsample)
    one = Batch(batch.image, batch.mask[:, :1], batch.names)
    assert loss(torch.ones(1))(single, one)[0].isfinite()
