import pytest
import torch

from dinoseg.adapters import frozen, full, lora
from dinoseg.errors import UserError


def trainable(module):
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def test_frozen_trains_nothing_and_builds_no_graph(tiny_backbone):
    backbone = frozen(tiny_backbone())
    assert not trainable(backbone)
    assert not backbone(torch.rand(1, 3, 16, 16))[0].requires_grad


def test_full_trains_all_that_the_features_depend_on(tiny_backbone):
    backbone = full(tiny_backbone())
    backbone(torch.rand(1, 3, 16, 16))[0].square().sum().backward()
    assert {name for name, p in backbone.named_parameters() if p.grad is None} == {"model.embeddings.mask_token"}
    assert "model.embeddings.mask_token" not in trainable(backbone)


@pytest.mark.parametrize(("targets", "per_block"), [("attention", 4), ("all_linear", 6)])
def test_lora_starts_as_the_backbone_and_trains_only_its_updates(tiny_backbone, targets, per_block):
    images = torch.rand(1, 3, 20, 28)
    before = tiny_backbone().eval()(images)[0]
    backbone = lora(tiny_backbone(), rank=2, alpha=2, targets=targets).eval()
    torch.testing.assert_close(backbone(images)[0], before)
    assert len(trainable(backbone)) == 2 * 2 * per_block
    assert all(".lora_" in name for name in trainable(backbone))


def test_lora_builds_no_graph_below_its_first_layer(tiny_backbone):
    backbone = lora(tiny_backbone(), rank=2, alpha=2)
    seen = []
    backbone.model.embeddings.register_forward_hook(lambda module, inputs, output: seen.append(output.requires_grad))
    assert backbone(torch.rand(1, 3, 16, 16))[0].requires_grad
    assert seen == [False]


def test_lora_scale_is_alpha_over_rank(tiny_backbone):
    backbone = lora(tiny_backbone(), rank=4, alpha=8)
    scales = {
        part.scaling["default"] for part in backbone.modules() if hasattr(part, "scaling") and hasattr(part, "lora_A")
    }
    assert scales == {2.0}


@pytest.mark.parametrize("rank", [0, -1])
def test_lora_rank_must_be_positive(tiny_backbone, rank):
    with pytest.raises(UserError, match=f"adapter.rank={rank}: LoRA needs a rank of at least 1"):
        lora(tiny_backbone(), rank=rank, alpha=1)


def test_lora_refuses_what_it_does_not_know(tiny_backbone):
    with pytest.raises(UserError, match="adapter.targets=mlp is unknown"):
        lora(tiny_backbone(), rank=1, alpha=1, targets="mlp")
    with pytest.raises(UserError, match="adapter.dropout=1.0"):
        lora(tiny_backbone(), rank=1, alpha=1, dropout=1.0)
    with pytest.raises(UserError, match="matches no linear layer"):
        lora(torch.nn.Conv2d(1, 1, 1), rank=1, alpha=1)
