from functools import partial

import pytest
import torch
from test_losses_mistakes import make_from_config, read_twins

from dinoseg.core.geometry import upsample, valid_share
from dinoseg.core.sample_maps import LabelMap
from dinoseg.core.shapes import Batch, Prediction
from dinoseg.losses.cross_entropy import CrossEntropy
from dinoseg.losses.focal import Focal
from dinoseg.losses.mask_classification import MaskClassification
from dinoseg.losses.multilabel import BinaryCrossEntropy
from dinoseg.losses.overlap import Dice
from dinoseg.losses.weighted_sum import WeightedSum

WEIGHTS = torch.tensor([0.5, 1.0, 2.0])
TERMS = {"ce": CrossEntropy, "dice": Dice}


def make(ignored=0.2):
    generator = torch.Generator().manual_seed(0)
    mask = torch.randint(0, 3, (2, 20, 30), generator=generator).to(torch.uint8)
    mask[torch.rand(mask.shape, generator=generator) < ignored] = 255
    logits = torch.randn(2, 3, 3, 4, dtype=torch.float64, generator=generator).requires_grad_()
    prediction = Prediction(logits, (20, 30), valid_share((20, 30), 8), upsample)
    return prediction, Batch(torch.zeros(2, 3, 20, 30, dtype=torch.uint8), mask, ["a", "b"])


def test_value_gradient_and_parts_are_those_of_the_terms():
    prediction, batch = make()
    value, parts = WeightedSum(TERMS, {"dice": 0.3, "ce": 2.0}, WEIGHTS)(prediction, batch)
    value.backward()
    gradient = prediction.outputs.grad.clone()
    prediction.outputs.grad = None
    ce, _ = CrossEntropy(WEIGHTS)(prediction, batch)
    dice, _ = Dice(WEIGHTS)(prediction, batch)
    (2.0 * ce + 0.3 * dice).backward()
    torch.testing.assert_close(value, 2.0 * ce + 0.3 * dice, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, prediction.outputs.grad, rtol=1e-12, atol=1e-15)
    assert list(parts) == ["ce", "dice"] and parts["ce"] == ce and parts["dice"] == dice
    assert not parts["dice"].requires_grad


def test_terms_give_a_weight_only_if_they_share_it():
    prediction, batch = make()
    terms = {"ce": CrossEntropy, "focal": Focal}
    loss = WeightedSum(terms, dict.fromkeys(terms, 1.0), WEIGHTS)
    weight = CrossEntropy(WEIGHTS)(prediction, batch)[1]["weight"]
    assert loss.num_divisors == 1 and loss(prediction, batch)[1]["weight"] == weight
    torch.testing.assert_close(loss.divisors(batch), weight.float()[None])
    loss = WeightedSum(TERMS, dict.fromkeys(TERMS, 1.0), WEIGHTS)
    torch.testing.assert_close(loss.divisors(batch), torch.stack([weight.float(), torch.tensor(2.0)]))
    part, value, parts = loss.step_loss(prediction, batch, torch.tensor([4.0, 4.0]) * loss.divisors(batch))
    alone, named = loss(prediction, batch)
    assert part.item() == pytest.approx(alone.item() / 4) and value == alone and parts == named


def test_terms_with_other_class_weights_have_own_divisors():
    _, batch = make()
    unweighted = partial(CrossEntropy, torch.ones(3))
    loss = WeightedSum({"ce": CrossEntropy, "own": unweighted}, {"ce": 1.0, "own": 1.0}, WEIGHTS)
    assert loss.num_divisors == 2 and len(set(loss.divisors(batch).tolist())) == 2
    same = WeightedSum({"ce": CrossEntropy, "focal": Focal}, {"ce": 1.0, "focal": 1.0}, WEIGHTS)
    assert same.num_divisors == 1
    layers = {"bce": BinaryCrossEntropy, "own": partial(BinaryCrossEntropy, torch.ones(3))}
    assert WeightedSum(layers, {"bce": 1.0, "own": 1.0}, WEIGHTS).num_divisors == 2
    with torch.device("meta"):
        assert WeightedSum({"ce": CrossEntropy}, {"ce": 1.0}, torch.ones(3)).num_divisors == 1


def test_single_term_and_zero_factor_are_valid():
    dice = Dice(WEIGHTS)(*make())[0]
    assert WeightedSum({"d": Dice}, {"d": 1}, WEIGHTS)(*make())[0] == dice
    assert WeightedSum(TERMS, {"ce": 0, "dice": 1}, WEIGHTS)(*make())[0] == dice


def test_scores_are_brought_to_the_masks_size_once():
    prediction, batch = make()
    sizes = []
    prediction.to_pixels = lambda outputs, size, valid: (sizes.append(size), upsample(outputs, size, valid))[1]
    loss = WeightedSum(TERMS, {"ce": 1.0, "dice": 1.0}, WEIGHTS)
    loss(prediction, batch)
    loss(prediction, batch)
    assert sizes == [(20, 30), (20, 30)]  # once for each call


def test_a_sum_needs_what_a_term_needs():
    assert not WeightedSum(TERMS, {"ce": 1.0, "dice": 1.0}, WEIGHTS).needs
    assert WeightedSum({"masks": MaskClassification, "dice": Dice}, {"masks": 1.0, "dice": 1.0}, WEIGHTS).needs == {
        "masks"
    }
    assert read_twins(LabelMap(), LabelMap()).needs_maps == {"twin": LabelMap()}  # one map of one kind


def test_a_sum_written_on_the_command_line():
    criterion = make_from_config(
        "loss=ce_dice",
        "loss.criterion.terms.ce.label_smoothing=0.1",
        "loss.criterion.factors.dice=0.5",
        "+loss.criterion.terms.focal={_target_: dinoseg.losses.focal.Focal, _partial_: true, gamma: 3.0}",
        "+loss.criterion.factors.focal=2.0",
        class_weights=WEIGHTS,
    )
    assert criterion.factors == {"ce": 1.0, "dice": 0.5, "focal": 2.0}
    prediction, batch = make()
    expected = (
        CrossEntropy(WEIGHTS, label_smoothing=0.1)(prediction, batch)[0]
        + 0.5 * Dice(WEIGHTS)(prediction, batch)[0]
        + 2.0 * Focal(WEIGHTS, gamma=3.0)(prediction, batch)[0]
    )
    torch.testing.assert_close(criterion(prediction, batch)[0], expected, rtol=1e-12, atol=0)
