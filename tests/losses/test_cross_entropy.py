import math

import pytest
import torch
import torch.nn.functional as F

from dinoseg.core.geometry import upsample, valid_share
from dinoseg.core.shapes import Batch, Prediction
from dinoseg.losses.cross_entropy import CrossEntropy
from dinoseg.losses.focal import Focal
from dinoseg.utils.errors import UserError


def make(mask, grid=(3, 4), classes=3, image=(20, 30)):
    torch.manual_seed(0)
    logits = torch.randn(len(mask), classes, *grid, dtype=torch.float32, requires_grad=True)
    prediction = Prediction(logits, image, valid_share(image, 8), upsample)
    return prediction, Batch(torch.zeros(len(mask), 3, *image, dtype=torch.uint8), mask, [""] * len(mask))


def by_hand(logits, mask, weights, smoothing=0.0, ignore=255):
    """Sum and divide pixel by pixel, in float64."""
    total = norm = 0.0
    scores = logits.double().log_softmax(1)
    for b, y, x in torch.cartesian_prod(*map(torch.arange, mask.shape)):
        label = int(mask[b, y, x])
        if label == ignore:
            continue
        row = scores[b, :, y, x]
        total += (1 - smoothing) * -row[label] * weights[label]
        total += smoothing / len(row) * sum(-row[k] * weights[k] for k in range(len(row)))
        norm += weights[label]
    return float(total / norm) if norm else 0.0


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("size", [(20, 30), (7, 5), (41, 33), (1, 1)])
def test_agrees_with_a_loop_over_pixels(size, smoothing):
    generator = torch.Generator().manual_seed(size[0])
    mask = torch.randint(0, 3, (2, *size), generator=generator).to(torch.uint8)
    mask[torch.rand(mask.shape, generator=generator) < 0.3] = 255
    weights = torch.tensor([0.2, 1.0, 3.0])
    prediction, batch = make(mask)
    value, parts = CrossEntropy(weights, 255, smoothing)(prediction, batch)
    assert parts["weight"].item() == pytest.approx(sum(float(weights[k]) * int((mask == k).sum()) for k in range(3)))
    expected = by_hand(prediction.logits(size).detach(), mask, weights.double(), smoothing)
    assert value.item() == pytest.approx(expected, rel=1e-5)


def test_without_smoothing_it_is_torchs_own_mean():
    mask = torch.randint(0, 3, (2, 20, 30)).to(torch.uint8)
    weights = torch.tensor([0.5, 1.0, 2.0])
    prediction, batch = make(mask)
    expected = F.cross_entropy(prediction.logits(), mask.long(), weights)
    torch.testing.assert_close(CrossEntropy(weights)(prediction, batch)[0], expected)


def test_another_ignore_value():
    mask = torch.tensor([[[0, 7], [1, 7]]], dtype=torch.uint8)
    prediction, batch = make(mask)
    value, _ = CrossEntropy(torch.ones(3), ignore_index=7)(prediction, batch)
    assert math.isfinite(value.item())
    assert value.item() == pytest.approx(
        by_hand(prediction.logits((2, 2)).detach(), mask, [1.0] * 3, ignore=7), rel=1e-5
    )


def test_label_smoothing_out_of_range_is_refused():
    with pytest.raises(UserError, match="^label_smoothing=1.0 is out of range. .* below 1"):
        CrossEntropy(torch.ones(3), label_smoothing=1.0)


@pytest.mark.parametrize("loss", [CrossEntropy, Focal])
def test_weights_of_another_number_of_classes_are_refused(loss):
    prediction, batch = make(torch.zeros(1, 20, 30, dtype=torch.uint8), classes=3)
    with pytest.raises(RuntimeError, match="weights for 2 classes, but the head scores 3. Give both"):
        loss(torch.ones(2))(prediction, batch)
