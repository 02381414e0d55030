"""What every loss promises, with the settings of its config and with others."""

import pytest
import torch
from config_files import options
from omegaconf import OmegaConf
from tiny_parts import load

from dinoseg.config.nodes import instantiate
from dinoseg.losses import mask_classification
from dinoseg.testing import check_loss

pytestmark = pytest.mark.slow

VARIANTS = [
    ("lovasz", {"per_image": True}),
    ("cross_entropy", {"label_smoothing": 0.1, "hard_fraction": 0.5}),
    ("cross_entropy", {"average": "all"}),
    ("focal", {"gamma": 0.5}),
    ("mask_classification", {"interpolation": "bilinear"}),
]


@pytest.fixture
def fixed_points(monkeypatch):
    """Sample the same points of every mask, so that the loss of a batch is known."""
    points = torch.rand(1, 64, 2, generator=torch.Generator().manual_seed(5))
    monkeypatch.setattr(mask_classification, "random_points", lambda count, *_: points.expand(count, -1, -1))
    monkeypatch.setattr(
        mask_classification, "uncertain_points", lambda masks, *_, **__: points.expand(len(masks), -1, -1)
    )


def make_loss(option, changes):
    node = OmegaConf.create({"data": {"ignore_index": 255}, "loss": load(f"loss={option}")["loss"]["criterion"]}).loss
    return instantiate(OmegaConf.merge(node, changes))


@pytest.mark.parametrize(("option", "changes"), [*((option, {}) for option in options("loss")), *VARIANTS])
def test_a_loss_keeps_the_contract(option, changes, fixed_points):
    check_loss(make_loss(option, changes))


def test_a_loss_that_samples_points_keeps_the_contract():
    check_loss(make_loss("mask_classification", {"num_points": 64}))
