import numpy as np
import pytest
import torch
from mistakes import refusals
from omegaconf import OmegaConf
from tiny_parts import load

from dinoseg.experiment.builder import Builder
from dinoseg.extensions.query_heads.eomt import EomtHead
from dinoseg.models.adapters import Frozen, Full, LastBlocks, Lora
from dinoseg.models.backbones.rgb import RgbBackbone
from dinoseg.models.heads.linear import LinearHead
from dinoseg.models.model import SegmentationModel, trained_names
from dinoseg.training.checkpoint import frozen_fingerprint

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def images(size):
    return torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(("size", "patch"), [((16, 24), 8), ((17, 23), 3), ((17, 23), 8), ((1, 1), 1), ((5, 50), 8)])
def test_each_patch_is_its_mean_colour(size, patch):
    backbone = RgbBackbone(patch, [-1, 0])
    maps = backbone(images(size))
    pixels = (images(size).numpy().astype(float).transpose(0, 2, 3, 1) - MEAN) / STD
    grid = tuple(-(-side // patch) for side in size)
    expected = np.zeros((2, 3, *grid))
    for row, column in np.ndindex(grid):
        part = pixels[:, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
        expected[:, :, row, column] = part.sum(axis=(1, 2)) / patch**2  # what is missing counts as zeros
    assert len(maps) == 2
    for found in maps:
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)


def test_rgb_backbone_works_with_frozen_adapter():
    backbone = Frozen()(RgbBackbone())
    assert not list(backbone.parameters()) and not backbone.state_dict()
    model = SegmentationModel(backbone, LinearHead(3, 1, 2)).train()
    assert model.head.training
    names = trained_names(model)
    assert names == {f"head.{name}" for name in model.head.state_dict()}
    assert frozen_fingerprint(model) == frozen_fingerprint(SegmentationModel(RgbBackbone(4), LinearHead(3, 1, 2)))
    assert list(Full()(RgbBackbone()).parameters()) == [] and not RgbBackbone().unused


@pytest.mark.parametrize("untrained", [False, True])
def test_rgb_backbone_is_built_from_its_config(untrained):
    cfg = OmegaConf.create(load("backbone=rgb", "adapter=frozen", "head=linear"))
    model = Builder(cfg).model(untrained=untrained)
    assert isinstance(model.backbone, RgbBackbone) and (model.patch_size, model.backbone.dim) == (8, 3)
    assert model(torch.zeros(1, 3, 20, 30, dtype=torch.uint8)).scores().shape == (1, 3, 20, 30)


test_message_names_value_and_remedy = refusals(
    {
        "LoRA": (lambda: Lora(rank=1, alpha=1)(RgbBackbone()), "matches no linear layer"),
        "last blocks": (lambda: LastBlocks(1)(RgbBackbone()), "blocks=1: this backbone reads 0 blocks"),
        "EoMT": (
            lambda: SegmentationModel(RgbBackbone(), EomtHead(3, 1, 2, patch_size=8, num_queries=2, blocks=1)),
            "EoMT and PMT need a plain vision transformer",
        ),
        "four maps": (lambda: RgbBackbone(layers=[-4, -3, -2, -1]), "layers=", "this backbone has 1"),
    }
)
