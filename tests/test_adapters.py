import math
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from mistakes import assert_refused, refusals
from tiny_parts import tiny_vit
from torch import nn

from dinoseg.core.contracts import Backbone
from dinoseg.models import adapters
from dinoseg.models.adapters import Frozen, Full, LastBlocks, Lora, merge
from dinoseg.models.model import quantised_names

IMAGES = torch.rand(1, 3, 20, 28, generator=torch.Generator().manual_seed(1))


class FusedVit(Backbone):
    """Two blocks with names as timm has them: one linear layer makes query, key and value."""

    unused = ()

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        parts = [{"qkv": nn.Linear(8, 24), "proj": nn.Linear(8, 8)} for _ in range(2)]
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"attn": nn.ModuleDict(part), "mlp": nn.ModuleDict({"fc1": nn.Linear(8, 16)})})
            for part in parts
        )
        self.norm = nn.LayerNorm(8)

    def forward(self, tokens):
        for block in self.blocks:
            query, key, value = block["attn"]["qkv"](tokens).chunk(3, dim=-1)
            tokens = tokens + block["attn"]["proj"]((query @ key.mT).softmax(-1) @ value)
            tokens = tokens + block["mlp"]["fc1"](tokens)[..., :8]
        return self.norm(tokens)


def trainable(module):
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def train_updates(backbone, amount=0.1):
    """Move the updates away from zero, as training would."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            if ".lora_" in name:
                parameter.add_(amount * torch.randn(parameter.shape, generator=generator))
    return backbone


def builds_graph(backbone, below):
    """Return whether the features of images need gradients, and whether the output of a module below them does."""
    seen = []
    below.register_forward_hook(lambda module, inputs, output: seen.append(output.requires_grad))
    return backbone(IMAGES)[0].requires_grad, seen


def test_frozen_trains_nothing_and_builds_no_graph(tiny_backbone):
    backbone = Frozen()(tiny_backbone())
    assert not trainable(backbone)
    assert not backbone(IMAGES)[0].requires_grad


def test_full_trains_all_that_the_features_depend_on(tiny_backbone):
    backbone = Full()(tiny_backbone())
    backbone(IMAGES)[0].square().sum().backward()
    assert {name for name, p in backbone.named_parameters() if p.grad is None} == {"model.embeddings.mask_token"}
    assert "model.embeddings.mask_token" not in trainable(backbone)


@pytest.mark.parametrize(("targets", "per_block"), [("attention", 4), ("all_linear", 6), (r"(q|v)_proj", 2)])
def test_lora_starts_as_the_backbone_and_trains_only_its_updates(tiny_backbone, targets, per_block):
    before = tiny_backbone().eval()(IMAGES)[0]
    backbone = Lora(rank=2, alpha=2, targets=targets)(tiny_backbone()).eval()
    torch.testing.assert_close(backbone(IMAGES)[0], before)
    assert len(trainable(backbone)) == 2 * 2 * per_block
    assert all(".lora_" in name for name in trainable(backbone))


def test_lora_builds_no_graph_below_its_first_layer(tiny_backbone):
    backbone = Lora(rank=2, alpha=2)(tiny_backbone())
    assert builds_graph(backbone, backbone.model.embeddings) == (True, [False])
    backbone = Lora(rank=2, alpha=2, blocks=1)(tiny_backbone())
    assert trainable(backbone) and all(".layer.1." in name for name in trainable(backbone))
    assert builds_graph(backbone, backbone.blocks[0]) == (True, [False])


@pytest.mark.parametrize(
    ("rank", "alpha", "rslora", "scale"),
    [(4, 8, False, 2.0), (32, 32, True, math.sqrt(32)), (32, 32, False, 1.0), (9, 6, True, 2.0)],
)
def test_update_scale_is_alpha_over_rank(rank, alpha, rslora, scale):
    module = FusedVit()
    tokens = torch.rand(1, 3, 8)
    layer = train_updates(Lora(rank=rank, alpha=alpha, rslora=rslora)(module)).blocks[0]["attn"]["proj"]
    low, high = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    by_hand = layer.base_layer(tokens) + scale * tokens @ low.T @ high.T
    torch.testing.assert_close(layer(tokens), by_hand)


@pytest.mark.parametrize("options", [{}, {"rslora": True, "targets": "all_linear"}])
def test_merged_updates_give_the_same_features_and_plain_names(tiny_backbone, options):
    names = set(tiny_backbone().state_dict())
    backbone = train_updates(Lora(rank=3, alpha=4, **options)(tiny_backbone())).eval()
    expected = backbone(IMAGES)[0]
    assert not torch.allclose(expected, tiny_backbone().eval()(IMAGES)[0], atol=1e-3)
    merged = merge(backbone)
    torch.testing.assert_close(merged(IMAGES)[0], expected, atol=1e-5, rtol=1e-4)
    assert set(merged.state_dict()) == names


def test_last_blocks_trains_blocks_and_norm_without_other_graph(tiny_backbone):
    backbone = LastBlocks(1)(tiny_backbone())
    last = {name for name, _ in backbone.named_parameters() if ".layer.1." in name or name.startswith("model.norm.")}
    assert trainable(backbone) == last
    assert builds_graph(backbone, backbone.blocks[0]) == (True, [False])
    backbone(IMAGES)[0].square().sum().backward()
    assert {name for name, p in backbone.named_parameters() if p.grad is not None} == last


@pytest.mark.parametrize(("bits", "error"), [(4, 0.15), (8, 0.02)])
@pytest.mark.parametrize("trained", [False, True])
def test_quantised_weights_are_small_close_and_stay(tiny_backbone, bits, error, trained):
    exact = tiny_backbone().eval()(IMAGES)[0]
    adapter = Lora(rank=2, alpha=2, bits=bits) if trained else Frozen(bits=bits)
    backbone = adapter(tiny_backbone()).to("cpu").eval()
    names = {name for name in quantised_names(backbone) if not name.endswith(".bias")}
    kept = {name: value.clone() for name, value in backbone.state_dict().items() if name in names}
    packed = [value for value in kept.values() if value.dtype in (torch.uint8, torch.int8)]
    assert len(packed) >= 12 and all(not parameter.requires_grad for parameter in packed)
    features = backbone(IMAGES)[0]
    assert (features - exact).norm() < error * exact.norm()
    assert not torch.equal(features, exact)
    if bits == 4:
        layer = backbone.blocks[0].attention.q_proj
        layer = layer.base_layer if trained else layer
        state = layer.weight.quant_state
        assert (state.quant_type, state.nested, layer.compute_dtype) == ("nf4", True, torch.bfloat16)
    if trained:
        features.square().sum().backward()
        assert {name for name, p in backbone.named_parameters() if p.grad is not None} == trainable(backbone)
        assert trainable(backbone) and all(".lora_" in name for name in trainable(backbone))
    for name, value in backbone.state_dict().items():
        assert name not in kept or torch.equal(value, kept[name])


@pytest.mark.parametrize("bits", [4, 8, None])
def test_updates_are_trained_in_full_precision(tiny_backbone, bits):
    adapter = Lora(rank=2, alpha=2, bits=bits)
    backbone = adapter(tiny_backbone(dtype="bfloat16")).to("cpu")
    assert trainable(backbone)
    assert {p.dtype for p in backbone.parameters() if p.requires_grad} == {torch.float32}
    features = train_updates(backbone)(IMAGES)[0]
    assert features.dtype == torch.float32 and features.isfinite().all()


@pytest.mark.parametrize("blocks", [0, 3, -1])
@pytest.mark.parametrize("adapter", [LastBlocks, lambda blocks: Lora(rank=1, alpha=1, blocks=blocks)])
def test_more_blocks_than_exist_are_refused(tiny_backbone, adapter, blocks):
    assert_refused(lambda: adapter(blocks)(tiny_backbone()), f"blocks={blocks}", " 1")


test_invalid_adapter_is_refused = refusals(
    {
        "rank of 0": (lambda: Lora(0, 1), "rank=0 ", "at least 1"),
        "dropout of all": (lambda: Lora(1, 1, dropout=1.0), "dropout=1.0"),
        "no regular expression": (lambda: Lora(1, 1, targets="(q"), "targets=(q is not a regular expression"),
        "3 bits": (lambda: Lora(1, 1, bits=3), "bits=3: give 4, 8, or null"),
        "full in half": (lambda: Full()(tiny_vit(dtype="bfloat16")), "adapter full", "dtype=float32", "lora"),
        "blocks in half": (lambda: LastBlocks(1)(tiny_vit(dtype="bfloat16")), "adapter last_blocks", "dtype=float32"),
        "no matching layer": (
            lambda: Lora(1, 1, targets="mixer")(tiny_vit()),
            *("targets=mixer matches no linear", "attention, all_linear", "k_proj, o_proj"),
        ),
    }
)


def test_layers_used_only_by_weight_are_refused_or_unquantised():
    module = FusedVit()
    module.uncalled_linears = frozenset({"blocks.0.attn.qkv", "blocks.1.attn.qkv"})
    words = ("targets=attention: ", "blocks.0.attn.qkv directly (2 such layers", "=proj")
    assert_refused(lambda: Lora(1, 1)(module), *words)
    module = Lora(rank=1, alpha=1, targets="proj", bits=4)(module).to("cpu")
    assert type(module.blocks[0]["attn"]["qkv"]) is nn.Linear and module(torch.rand(1, 3, 8)).isfinite().all()
    assert quantised_names(module)


def test_last_blocks_does_not_train_unused_parameters():
    module = FusedVit()
    module.unused = ("blocks.1.mlp.fc1.bias",)
    assert "blocks.1.mlp.fc1.bias" not in trainable(LastBlocks(1)(module))


def test_bits_without_bitsandbytes_are_refused():
    with patch.object(adapters, "find_spec", return_value=None):
        assert_refused(lambda: Frozen(bits=8), "pip install '.[quant")


IMPORTS = """
import sys
from tiny_parts import tiny_vit
from dinoseg.models.adapters import Lora, merge

merge(Lora(2, 4)(tiny_vit()))
assert not {"bitsandbytes", "networkx"} & sys.modules.keys()
quantised = Lora(2, 4, bits=4)(tiny_vit())
assert {type(part).__module__ for part in quantised.modules()} > {"peft.tuners.lora.layer", "bitsandbytes.nn.modules"}
Lora(2, 4)(tiny_vit())
import bitsandbytes.nn
"""


@pytest.mark.heavy
@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
def test_bitsandbytes_is_imported_for_quantised_layers_alone():
    done = subprocess.run([sys.executable, "-c", IMPORTS], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
