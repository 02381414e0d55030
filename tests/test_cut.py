"""A model cut behind its frozen part: predictions and gradients are those of the whole, bit for bit."""

import copy

import pytest
import torch
from mistakes import assert_refused
from tiny_parts import tiny_vit

from dinoseg.core.contracts import Head
from dinoseg.extensions.query_heads.eomt import EomtHead
from dinoseg.extensions.query_heads.mask2former.head import Mask2FormerHead
from dinoseg.extensions.query_heads.pmt import PmtHead
from dinoseg.models.adapters import Frozen, Full, LastBlocks, Lora
from dinoseg.models.backbones.convnext import ConvNext
from dinoseg.models.backbones.rgb import RgbBackbone
from dinoseg.models.backbones.timm_backbone import TimmBackbone
from dinoseg.models.backbones.transformers_vit import TransformersVit
from dinoseg.models.heads.detail import DetailHead
from dinoseg.models.heads.linear import LinearHead
from dinoseg.models.model import SegmentationModel

CONVNEXT = {"hidden_sizes": [8, 16, 16, 24], "depths": [1, 1, 1, 1]}
VIT = {"hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 3, "intermediate_size": 24}
IMAGES = torch.randint(0, 256, (2, 3, 37, 51), dtype=torch.uint8)
BACKBONES = {
    "dino": lambda layers: TransformersVit("vit", {**VIT, "image_size": 32}, "random", 8, layers),
    "dinov3": lambda layers: deep_vit(layers),
    "timm": lambda layers: TimmBackbone("test_vit", "random", None, layers),
    "convnext": lambda layers: ConvNext(CONVNEXT, "random", 32, layers),
    "rgb": lambda layers: RgbBackbone(8, [-1] * len(layers)),
}


def deep_vit(layers=(-1,), **arch):
    torch.manual_seed(0)
    return TransformersVit("dinov3_vit", {**VIT, **arch}, "random", 8, layers)


def model_of(backbone, **options):
    torch.manual_seed(1)
    return SegmentationModel(backbone, LinearHead(backbone.dim, backbone.num_layers, 3), **options).train()


def check_cut(model, size=(37, 51)):
    """Compare a step on images with one on what is frozen of them, taken apart by sample in between."""
    images = torch.randint(0, 256, (3, 3, *size), dtype=torch.uint8)
    other = copy.deepcopy(model)
    frozen = model.frozen(images)
    frozen.tensors = [torch.stack([row.clone() for row in part]) for part in frozen.tensors]
    results = []
    for net, given in ((model, images), (other, frozen)):
        torch.manual_seed(2)  # dropout
        scores = net(given).scores()
        scores.square().mean().backward()
        results.append((scores, [parameter.grad for parameter in net.parameters()]))
    assert results[0][0].shape == (3, 3, *size) and torch.equal(results[0][0], results[1][0])
    assert sum(gradient is not None for gradient in results[0][1]) > 0
    for live, cached in zip(results[0][1], results[1][1], strict=True):
        assert (live is None and cached is None) or torch.equal(live, cached)
    return frozen


def test_frozen_maps_suffice_for_a_head():
    frozen = check_cut(model_of(Frozen()(deep_vit([1, 3]))))
    assert [part.shape for part in frozen.tensors] == [(3, 1 + 5 * 7, 24)] * 2
    assert not any(part.requires_grad for part in frozen.tensors)


@pytest.mark.parametrize(("size", "scale", "longest"), [((64, 1), 1.0, None), ((61, 90), 0.5, None), ((61, 90), 1, 40)])
def test_frozen_features_store_image_and_input_sizes(size, scale, longest):
    model = model_of(Frozen()(deep_vit()), scale=scale, longest=longest)
    frozen = check_cut(model, size)
    assert frozen.size == size and frozen.seen == model.input_size(size)


@pytest.mark.parametrize("layers", [[-1], [0, 2, 3], [3, 1], [2, 2]])
@pytest.mark.parametrize("adapter", [LastBlocks(1), LastBlocks(2), Lora(2, 4, blocks=1, dropout=0.5)])
@pytest.mark.parametrize("name", ["dino", "dinov3"])
def test_tokens_enter_the_first_trained_block(name, adapter, layers):
    backbone = adapter(BACKBONES[name](layers))
    first = len(backbone.blocks) - (adapter.blocks or 0)
    frozen = check_cut(model_of(backbone))
    assert len(frozen.tensors) == 1 + len({layer % 4 for layer in layers if layer % 4 < first})
    assert frozen.tensors[-1].shape == (3, backbone.num_prefix + 35, 24)


@pytest.mark.parametrize("layers", [[-1], [0, 1, 3], [5, 1]])
def test_tokens_enter_the_first_trained_block_of_timm(layers):
    backbone = LastBlocks(2)(BACKBONES["timm"](layers))
    count = len(backbone.blocks)
    frozen = check_cut(model_of(backbone))
    assert len(frozen.tensors) == 1 + len([layer for layer in backbone.layers if layer < count - 2])


def test_frozen_layers_of_timm_keep_their_order():
    check_cut(model_of(Frozen()(BACKBONES["timm"]([5, 1]))))


@pytest.mark.parametrize("layers", [[-1], [0, 2, 3], [3, 1]])
@pytest.mark.parametrize("adapter", [Frozen(), LastBlocks(2), Lora(2, 4, blocks=1, dropout=0.5)])
@pytest.mark.parametrize("name", ["dino", "dinov3", "timm"])
def test_pmt_resumes_from_all_tokens(name, adapter, layers):
    backbone = adapter(BACKBONES[name](layers))
    torch.manual_seed(1)
    head = PmtHead(backbone.dim, len(layers), 3, patch_size=backbone.patch_size, num_queries=3, blocks=2)
    model = SegmentationModel(backbone, head).train()
    frozen = check_cut(model)
    read = [layer for layer in {*backbone.layers} if layer < (backbone.first_trained or 100)]
    assert len(frozen.tensors) == len(read) + (backbone.first_trained is not None)
    tokens = {"dino": 1 + 35, "dinov3": deep_vit().num_prefix + 35, "timm": 1 + 12}[name]
    assert {part.shape[1] for part in frozen.tensors} == {tokens} and len(model(frozen).outputs.aux) == 2
    live, kept = (model.eval()(given).scores() for given in (IMAGES, model.frozen(IMAGES)))
    assert torch.equal(live, kept)


@pytest.mark.parametrize("deep", [True, False])
@pytest.mark.parametrize("trained", ["all", "class_embed"])
def test_mask2former_resumes_from_maps_or_from_queries_and_masks(trained, deep):
    torch.manual_seed(1)
    small = {"num_heads": 4, "hidden_dim": 64, "feedforward_dim": 8, "num_queries": 3}
    head = Mask2FormerHead(24, 4, 3, **small, drop_path=0.3, deep_supervision=deep)
    if trained == "class_embed":  # which the head itself does with a file of weights
        head.requires_grad_(False).predictor.class_embed.requires_grad_(True)
    model = SegmentationModel(Frozen()(deep_vit([0, 1, 2, 3])), head).train()
    frozen = check_cut(model)
    assert len(frozen.tensors) == {"all": 5, "class_embed": 20 if deep else 2}[trained]
    assert len(model(frozen).outputs.aux) == 9 * deep
    live, kept = (model.eval()(given).scores() for given in (IMAGES, model.frozen(IMAGES)))
    assert torch.equal(live, kept)


@pytest.mark.parametrize(
    ("name", "adapter"), [(name, Frozen()) for name in BACKBONES] + [("dinov3", LastBlocks(1)), ("timm", LastBlocks(1))]
)
def test_detail_head_resumes_from_maps_and_bytes(name, adapter):
    backbone = adapter(BACKBONES[name]([-1, -1] if name == "rgb" else [1, 3]))
    torch.manual_seed(1)
    head = DetailHead(backbone.dim, 2, 3, backbone.patch_size, fine=4, width=8, linear_skip=True)
    frozen = check_cut(SegmentationModel(backbone, head).train())
    assert frozen.tensors[-1].dtype == torch.uint8 and frozen.tensors[-1].shape == (3, 3, 37, 51)
    reduced = SegmentationModel(backbone, head, scale=0.5).eval()  # whose pixels are no bytes
    live, kept = (reduced(given).scores() for given in (IMAGES, reduced.frozen(IMAGES)))
    torch.testing.assert_close(live, kept, atol=0.02, rtol=0)


@pytest.mark.parametrize(
    ("adapter", "backbone", "told"),
    [
        (Full(), "dinov3", "first trained block"),
        (Lora(2, 4), "dinov3", "blocks=4"),
        (LastBlocks(1), "convnext", "can only be split after its last block"),
    ],
)
def test_backbone_that_cannot_be_cut_is_refused(adapter, backbone, told):
    model = model_of(adapter(BACKBONES[backbone]([-1])))
    assert_refused(lambda: model.frozen(torch.zeros(1, 3, 64, 64)), told)


def test_random_positions_are_not_sampled_twice():
    backbone = LastBlocks(1)(deep_vit(pos_embed_rescale=2.0))
    assert backbone.first_trained == 0
    assert Frozen()(backbone).first_trained is None


def test_a_head_with_a_run_of_its_own_and_no_door_is_refused():
    head = EomtHead(24, 1, 3, patch_size=8, num_queries=2, blocks=1)
    model = SegmentationModel(Frozen()(tiny_vit()), head)
    words = ("EomtHead runs the backbone itself", "engine.cache=off")
    assert_refused(lambda: model.frozen(torch.zeros(1, 3, 16, 16)), *words)
    assert EomtHead.forward_frozen is Head.forward_frozen
