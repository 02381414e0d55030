"""What the class token attends to, against the libraries' own written-out attention."""

import copy
import math

import pytest
import timm
import torch
from mistakes import assert_refused
from torch import nn

from dinoseg.models.adapters import Frozen, Full, Lora, merge
from dinoseg.models.backbones.attention import class_weights, plain_attention
from dinoseg.models.backbones.timm_backbone import TimmBackbone
from dinoseg.models.backbones.transformers_vit import TransformersVit

SMALL = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3}
FAMILIES = {  # values, prefix tokens
    "vit": ({**SMALL, "intermediate_size": 48, "image_size": 32}, 1),
    "dinov2": ({**SMALL, "mlp_ratio": 2, "image_size": 32}, 1),
    "dinov2_with_registers": ({**SMALL, "mlp_ratio": 2, "image_size": 32, "num_register_tokens": 4}, 5),
    "dinov3_vit": ({**SMALL, "intermediate_size": 48, "num_register_tokens": 2, "key_bias": True}, 3),
}
TIMM = {"test_vit": (1, 2), "deit_tiny_distilled_patch16_224": (2, 3)}  # prefix tokens, heads


def shake(module, scale=0.2):
    """Move every parameter from where it starts: biases off zero, projections large enough for uneven attention."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn(parameter.shape))  # drawn in float32 whatever it is
    return module.eval()


def build(family, layers=(-1,), **kwargs):
    torch.manual_seed(0)
    return shake(TransformersVit(family, FAMILIES[family][0], "random", 8, layers, **kwargs))


def build_timm(name, layers=(-1,), **kwargs):
    torch.manual_seed(0)
    backbone = TimmBackbone(name, "random", None, layers, **kwargs)
    return shake(backbone, 0.05).requires_grad_(False)


def images(size):
    return torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(2))


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def eager(backbone, pixels):
    """Return transformers' own attention of each block, of a model that attends written out."""
    model = copy.deepcopy(backbone.model)
    model.config._attn_implementation = "eager"
    found = []
    blocks = model.layers if hasattr(model, "layers") else (getattr(model, "encoder", None) or model.model).layer
    for block in blocks:
        block.attention.register_forward_hook(lambda _, __, out: found.append(out[1]))
    twin = copy.copy(backbone)
    twin._modules = {**backbone._modules, "model": model}
    twin(pixels)
    return found


def all_tokens(attention, prefix, grid):
    """Cut the class token's row on the patches out of (B, heads, N, N)."""
    return attention[:, :, 0, prefix:].unflatten(-1, grid)


@pytest.mark.parametrize("size", [(27, 30), (9, 41), (1, 1)])
def test_it_is_transformers_own_at_any_size(family, size):
    backbone = Frozen()(build(family))
    prefix = FAMILIES[family][1]
    entered = []
    for part in (backbone.model.embeddings.patch_embeddings, *backbone.blocks):
        part.register_forward_hook(lambda part, *_: entered.append(part))
    maps, found = backbone.with_class_attention(images(size))
    assert backbone.has_class_attention and len(entered) == 4  # one pass serves both
    assert not found.requires_grad and not maps[0].requires_grad
    grid = tuple(-(-side // 8) for side in size)
    whole = eager(backbone, images(size))[-1]
    assert whole.shape[-1] == prefix + math.prod(grid) and found.shape == (2, 3, *grid)
    torch.testing.assert_close(found, all_tokens(whole, prefix, grid), atol=1e-6, rtol=1e-5)
    assert all(map(torch.equal, maps, backbone(images(size))))


@pytest.mark.parametrize("layers", [(0,), (1, 0), (0, 1)])
def test_it_is_of_the_last_block_that_is_read(family, layers):
    whole, cut = build(family, (0, 1, 2)), build(family, layers)
    cut.load_state_dict({key: value for key, value in whole.state_dict().items() if key in cut.state_dict()})
    _, found = cut.with_class_attention(images((17, 40)))
    attentions = eager(whole, images((17, 40)))
    own = all_tokens(attentions[max(layers)], FAMILIES[family][1], (3, 5))
    torch.testing.assert_close(found, own, atol=1e-6, rtol=1e-5)


def test_lora_s_updates_count(family):
    backbone = Lora(rank=2, alpha=4)(build(family))
    _, before = backbone.with_class_attention(images((20, 30)))
    shake(nn.ParameterList([p for p in backbone.parameters() if p.requires_grad]))
    maps, found = backbone.with_class_attention(images((20, 30)))
    assert (found - before).abs().max() > 0.01
    merged = merge(copy.deepcopy(backbone))
    expected = all_tokens(eager(merged, images((20, 30)))[-1], FAMILIES[family][1], (3, 4))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(maps[0], merged(images((20, 30)))[0], atol=1e-4, rtol=1e-4)


def test_half_precision_gives_float32_that_sums_exactly(family):
    exact = build(family).with_class_attention(images((32, 48)))[1]
    half = build(family, dtype="bfloat16").with_class_attention(images((32, 48)))[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = build(family).with_class_attention(images((32, 48)))[1]
    for found in (half, mixed):
        assert found.dtype == torch.float32 and 0 < (found - exact).abs().max() < 0.05
    query, key = (torch.randn(1, 2, 40, 8, dtype=torch.bfloat16) for _ in range(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weights = class_weights(query, key, 0.3)
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 2), atol=1e-6, rtol=0)
    logits = 0.3 * (query[:, :, 0, None].double() * key.double()).sum(-1)
    torch.testing.assert_close(weights.double(), logits.softmax(-1), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", [*FAMILIES, "timm"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_the_maps_are_as_without_it(name, checkpointing):
    options = {"checkpointing": checkpointing}
    backbone = build_timm("test_vit", **options) if name == "timm" else build(name, **options)
    expected = backbone.with_class_attention(images((16, 24)))[1]
    Full()(backbone).train()
    gradients = []
    for run in (backbone, lambda pixels: backbone.with_class_attention(pixels)[0]):
        backbone.zero_grad()
        run(images((16, 24)))[0].square().mean().backward()
        gradients.append({name: p.grad for name, p in backbone.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and gradients[0]
    assert all(torch.equal(gradients[1][name], gradient) for name, gradient in gradients[0].items())
    found = backbone.with_class_attention(images((16, 24)))[1]
    torch.testing.assert_close(found, expected)
    with pytest.raises(RuntimeError):
        backbone.with_class_attention(torch.rand(1, 5, 16, 16))
    assert not found.requires_grad and not any("watcher" in vars(part) for part in backbone.modules())


@pytest.mark.parametrize("name", ["test_vit2", "test_convnext", "eva02_tiny_patch14_224"])
def test_models_without_it_say_so(name):
    backbone = TimmBackbone(name, "random", None)
    assert not backbone.has_class_attention
    words = (f"name={name}: this model has no class token", " Choose a plain")
    assert_refused(lambda: backbone.with_class_attention(images((32, 32))), *words)
    assert_refused(lambda: backbone.with_keys(images((32, 32))), *words)


def test_attention_of_another_kind_is_not_taken_for_plain():
    for kind, has in (("", True), ("diff", False)):
        model = timm.create_model("test_vit", num_classes=0, attn_layer=kind)
        assert (plain_attention(model) is not None) == has


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "dinov3_vit"])
@pytest.mark.parametrize("size", [(27, 30), (32, 32)])
def test_keys_are_the_projection_of_the_last_tapped_block(family, size):
    backbone = build(family, layers=(1,))
    attention = backbone.blocks[-1].attention
    found = []
    linear = next(part for name, part in attention.named_modules() if name.split(".")[-1] in ("key", "k_proj"))
    linear.register_forward_hook(lambda _, __, out: found.append(out))
    maps, keys = backbone.with_keys(images(size))
    prefix, grid = FAMILIES[family][1], maps[0].shape[2:]
    torch.testing.assert_close(keys.flatten(2).transpose(1, 2), found[0][:, prefix:])
    assert keys.shape == (2, 24, *grid) and not keys.requires_grad
    torch.testing.assert_close(maps[0], backbone(images(size))[0])


def test_rotated_keys_of_dinov3_explain_its_class_attention():
    backbone = build("dinov3_vit")
    attention = backbone.blocks[-1].attention
    queries = []
    attention.q_proj.register_forward_hook(lambda _, __, out: queries.append(out))
    _, keys = backbone.with_keys(images((27, 30)))
    expected = backbone.with_class_attention(images((27, 30)))[1]
    by_head = keys.unflatten(1, (3, 8))  # (B, heads, C, h, w)
    logits = torch.einsum("bac,bachw->bahw", queries[0][:, 0].unflatten(1, (3, 8)), by_head) / math.sqrt(8)
    ratio = logits.flatten(2).diff(dim=2).exp()  # the class token is not rotated
    seen = expected.flatten(2)
    torch.testing.assert_close(ratio, seen[..., 1:] / seen[..., :-1], rtol=1e-4, atol=1e-5)


def test_keys_of_timm_are_the_second_third_of_its_projection():
    torch.manual_seed(0)
    backbone = shake(TimmBackbone("test_vit", "random", None, (-1,)))
    found = []
    attention = backbone.model.blocks[-1].attn
    attention.register_forward_hook(lambda _, given, __: found.append(given[0]))
    _, keys = backbone.with_keys(images((32, 48)))
    width = keys.shape[1]
    weight, bias = attention.qkv.weight[width : 2 * width], attention.qkv.bias[width : 2 * width]
    expected = (found[0] @ weight.T + bias)[:, backbone.model.num_prefix_tokens :]
    torch.testing.assert_close(keys.flatten(2).transpose(1, 2), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", ["two prefix tokens", "plain", "normed queries and keys", "lora", "earlier block"])
def test_timm_s_is_that_of_its_own_written_out_attention(variant):
    name = "deit_tiny_distilled_patch16_224" if variant == "two prefix tokens" else "test_vit"
    prefix, heads = TIMM[name]
    backbone = build_timm(name, (2, 0) if variant == "earlier block" else (-1,))
    attention = backbone.model.blocks[-1].attn
    if variant == "normed queries and keys":
        width = attention.qkv.weight.shape[1] // heads
        attention.q_norm, attention.k_norm = (shake(nn.LayerNorm(width), 0.5) for _ in "qk")
    if variant == "lora":
        Lora(rank=2, alpha=6, targets="qkv")(backbone)
        shake(nn.ModuleList([attention.qkv.lora_A["default"], attention.qkv.lora_B["default"]]))
    maps, found = backbone.with_class_attention(images((41, 70)))
    assert backbone.has_class_attention and not attention.qkv._forward_hooks
    attention.fused_attn, seen = False, []
    attention.attn_drop.register_forward_hook(lambda _, __, out: seen.append(out))
    torch.testing.assert_close(maps, backbone(images((41, 70))), atol=1e-5, rtol=1e-4)
    assert len(seen) == 1 and found.shape == (2, heads, 3, 5) and found.dtype == torch.float32
    torch.testing.assert_close(found, all_tokens(seen[0], prefix, (3, 5)), atol=1e-6, rtol=1e-5)
    assert found.std() > 0.03 * found.mean()
