"""A plain vision transformer split before its first trained block returns the maps of one pass."""

import pytest
import torch

from dinoseg.models.adapters import Frozen, Full, LastBlocks
from dinoseg.models.backbones.timm_backbone import TimmBackbone
from dinoseg.models.backbones.transformers_vit import TransformersVit

DEEP = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "num_hidden_layers": 10}


@pytest.mark.parametrize("adapter", [Frozen(), LastBlocks(1), Full()])
@pytest.mark.parametrize(
    "make",
    [
        lambda: TimmBackbone("test_vit", "random", None, [1, 0, 1]),
        lambda: TransformersVit("vit", {**DEEP, "image_size": 32}, "random", 16, [9, 2, 9]),
    ],
    ids=["timm", "transformers"],
)
def test_split_keeps_the_order_of_unsorted_layers(make, adapter):
    torch.manual_seed(0)
    backbone = make().eval()
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(torch.randn_like(parameter) / 5)
    backbone = adapter(backbone)
    images = torch.rand(2, 3, 33, 50)
    found = backbone.forward_trainable(backbone.forward_frozen(images), (33, 50))
    for part, expected in zip(found, backbone(images), strict=True):
        torch.testing.assert_close(part, expected)
