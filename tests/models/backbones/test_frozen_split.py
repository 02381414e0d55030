"""A plain vision transformer split before its first trained block returns the maps of one pass."""

import pytest
import torch

from dinoseg.models.adapters import Frozen, Full, LastBlocks
from dinoseg.models.backbones.timm_backbone import TimmBackbone


@pytest.mark.parametrize("adapter", [Frozen(), LastBlocks(1), Full()])
def test_split_keeps_the_order_of_unsorted_layers(adapter):
    torch.manual_seed(0)
    backbone = TimmBackbone("test_vit", "random", None, [1, 0, 1]).eval()
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(torch.randn_like(parameter) / 5)
    backbone = adapter(backbone)
    images = torch.rand(2, 3, 33, 50)
    found = backbone.forward_trainable(backbone.forward_frozen(images), (33, 50))
    for part, expected in zip(found, backbone(images), strict=True):
        torch.testing.assert_close(part, expected)
