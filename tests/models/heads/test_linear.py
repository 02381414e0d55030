"""Dropout and initial weights of the linear head, against the official formulas in numpy float64."""

import numpy as np
import pytest
import torch
from torch import nn

from dinoseg.models.heads.linear import LinearHead
from dinoseg.utils.errors import UserError


def official(features, dropped, head):
    """Return the scores in training: dropout, then BatchNorm with batch statistics, then the 1x1 convolution."""
    dropped = features * dropped
    mean = dropped.mean((0, 2, 3), keepdims=True)
    variance = dropped.var((0, 2, 3), keepdims=True)
    gain, shift, weight, bias = (
        part.detach().numpy() for part in (head.norm.weight, head.norm.bias, head.classify.weight, head.classify.bias)
    )
    normal = (dropped - mean) / np.sqrt(variance + 1e-5) * gain[:, None, None] + shift[:, None, None]
    return np.einsum("kc,bchw->bkhw", weight[:, :, 0, 0], normal) + bias[:, None, None]


@pytest.mark.parametrize("size", [(3, 5), (1, 4), (7, 7)])
@pytest.mark.parametrize("dropout", [0.1, 0.6])
def test_channels_are_dropped_before_the_norm(size, dropout):
    for seed in range(3):
        torch.manual_seed(seed)
        head = LinearHead(16, 1, 4, dropout=dropout, init="normal").double()
        nn.init.normal_(head.norm.weight)
        nn.init.normal_(head.norm.bias)
        features = torch.randn(3, 16, *size, dtype=torch.float64)
        torch.manual_seed(seed)
        dropped = nn.Dropout2d(dropout)(torch.ones_like(features)).numpy()
        assert set(dropped.flatten().round(12)) == {0, round(1 / (1 - dropout), 12)}
        assert (dropped == dropped[:, :, :1, :1]).all()
        torch.manual_seed(seed)
        found = head.train()([features]).detach().numpy()
        np.testing.assert_allclose(found, official(features.numpy(), dropped, head), rtol=1e-9, atol=1e-12)


def test_evaluation_drops_nothing():
    features = torch.randn(2, 8, 3, 4)
    torch.manual_seed(0)
    head, plain = LinearHead(8, 1, 3, dropout=0.5).eval(), LinearHead(8, 1, 3).eval()
    plain.load_state_dict(head.state_dict())
    assert torch.equal(head([features]), plain([features]))


def test_normal_weights():
    torch.manual_seed(0)
    head = LinearHead(384, 2, 150, init="normal")
    weights = head.classify.weight.detach()
    assert head.init is None and not head.classify.bias.any()
    assert weights.std().item() == pytest.approx(0.01, rel=0.02) and abs(weights.mean().item()) < 1e-4
    assert weights.abs().max() > 0.03  # not uniform
    torch.manual_seed(0)
    plain, probe = LinearHead(384, 2, 150), LinearHead(384, 2, 150, init="probe")
    assert plain.classify.bias.any() and plain.init is None and probe.init == "probe"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init": "zeros"}, "init=zeros is unknown. Choose one of probe, normal or None"),
        ({"dropout": 1.0}, "dropout=1.0 .*at least 0 and below 1"),
        ({"dropout": -0.1}, "dropout=-0.1"),
    ],
)
def test_other_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        LinearHead(8, 1, 3, **options)
