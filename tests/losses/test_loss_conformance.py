"""What every loss promises, with the settings of its config and with others."""

import pytest
import torch
from config_files import options, read_whole
from omegaconf import OmegaConf
from test_mask_classification import fix_points
from tiny_parts import load_option

from dinoseg.config.nodes import instantiate
from dinoseg.testing import check_loss

pytestmark = pytest.mark.slow

RELATIVES = ("bce_dice", "ce_dice", "ce_lovasz", "tversky")  # sums of losses that are tried alone, and one like dice
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
    fix_points(monkeypatch, torch.rand(1, 64, 2, generator=torch.Generator().manual_seed(5)))


def make_loss(option, changes, ignore_index=255):
    loss = load_option("loss", option)
    node = OmegaConf.create({"data": {"ignore_index": ignore_index}, "loss": loss["criterion"]}).loss
    return instantiate(OmegaConf.merge(node, changes))


@pytest.mark.parametrize(
    ("option", "changes"),
    [
        *(
            pytest.param(option, {}, marks=[pytest.mark.heavy] if option in RELATIVES else [])
            for option in options("loss")
            if read_whole("loss", option)["counts"]
        ),
        *(pytest.param(*variant, marks=pytest.mark.heavy) for variant in VARIANTS),
    ],
)
def test_a_loss_keeps_the_contract(option, changes, fixed_points):
    check_loss(make_loss(option, changes))


def test_a_loss_that_samples_points_keeps_the_contract():
    check_loss(make_loss("mask_classification", {"num_points": 64}))


@pytest.mark.parametrize("option", [option for option in options("loss") if read_whole("loss", option)["counts"]])
def test_class_weights_and_ignore_index_reach_all_terms(option):
    node = load_option("loss", option)["class_weights"]
    assert node["_target_"].endswith(".class_weights") and node["scheme"] == "${..weights}"
    weights = torch.tensor([0.5, 1.0, 2.0])
    loss = make_loss(option, {}, ignore_index=9)(class_weights=weights)
    for term in getattr(loss, "losses", [loss]):
        assert term.ignore_index == 9 and torch.equal(term.weight, weights)
