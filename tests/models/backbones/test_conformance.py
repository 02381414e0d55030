"""What every backbone promises to every head, whatever library it comes from."""

import re

import pytest
import torch
from omegaconf import OmegaConf
from tiny_parts import BACKBONES, PYRAMIDS, WEIGHTLESS, tiny_node

from dinoseg.config.nodes import instantiate
from dinoseg.core.contracts import Head
from dinoseg.core.geometry import widths
from dinoseg.models.adapters import Frozen, Full, LastBlocks, Lora
from dinoseg.models.model import SegmentationModel
from dinoseg.testing import check_backbone
from dinoseg.utils.errors import UserError

WITH_CLASS_TOKEN = {"dino", "dinov2", "dinov2_registers", "dinov3", "timm_vit"}
with_weights = pytest.mark.parametrize("name", BACKBONES, indirect=True, scope="module")


@pytest.fixture(scope="module", params=BACKBONES | WEIGHTLESS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def build(name):
    node = tiny_node(name)

    def make(layers=(-1,), **changes):
        torch.manual_seed(0)
        return instantiate(OmegaConf.to_container(OmegaConf.merge(node, {"layers": layers}, changes))).eval()

    return make


def noise(batch, size):
    return torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(3))


@pytest.mark.slow
def test_backbone_fulfils_the_contract(name):
    node = tiny_node(name)
    check_backbone(lambda layers: instantiate(OmegaConf.to_container(OmegaConf.merge(node, {"layers": layers}))))


def test_four_maps_have_the_strides_of_their_family(build, name):
    backbone = build([0, 0, -1, -1] if name in WEIGHTLESS else "quarters")
    maps = backbone(noise(2, (33, 75)))
    assert len(maps) == backbone.num_layers == 4 and [part.shape[1] for part in maps] == widths(backbone.dim, 4)
    rows, columns = (-(-side // backbone.patch_size) for side in (33, 75))
    strides = [8, 4, 2, 1] if name in PYRAMIDS else [1, 1, 1, 1]
    assert [tuple(part.shape[2:]) for part in maps] == [(rows * s, columns * s) for s in strides]


def test_normalisation_is_inside(build):
    images = noise(1, (64, 64))
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    by_hand = (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    plain, inside = build(mean=[0, 0, 0], std=[1, 1, 1]), build(mean=mean, std=std)
    torch.testing.assert_close(inside(images)[0], plain(by_hand)[0])


def test_prefix_tokens_are_dropped_and_positions_preserved(build):
    """What changes in the image's corner changes the map there the most: no token is out of place."""
    backbone = build()
    images = noise(1, (4 * backbone.patch_size, 6 * backbone.patch_size))
    for row, column in ((0, 0), (3, 5), (1, 4)):
        changed = images.clone()
        p = backbone.patch_size
        changed[..., row * p : (row + 1) * p, column * p : (column + 1) * p] = torch.rand(3, p, p)
        difference = (backbone(changed)[0] - backbone(images)[0]).norm(dim=1)[0]  # (4, 6)
        assert divmod(int(difference.argmax()), 6) == (row, column)


def test_class_attention_is_returned_with_the_maps_if_supported(build, name):
    backbone = build()
    assert getattr(backbone, "has_class_attention", False) == (name in WITH_CLASS_TOKEN)
    if name in WITH_CLASS_TOKEN:
        maps, found = backbone.with_class_attention(noise(2, (41, 70)))
        assert all(map(torch.equal, maps, backbone(noise(2, (41, 70)))))
        assert found.shape[::2] == maps[0].shape[::2] and found.shape[3] == maps[0].shape[3] and found.shape[1] > 1
        total = found.flatten(2).sum(-1)
        assert (found > 0).all() and (total < 1).all() and (total > 0.4).all()  # of these few tokens most are patches


def test_frozen_backbone_stays_in_eval_mode_while_a_head_trains(build):
    model = SegmentationModel(Frozen()(build()), Head()).train()
    assert not any(part.training for part in model.backbone.modules() if list(part.parameters()))
    images = noise(1, (64, 96))
    first, second = (model.backbone(images)[0] for _ in range(2))
    assert torch.equal(first, second) and not first.requires_grad


@with_weights
@pytest.mark.parametrize("adapter", [Full(), LastBlocks(2), Lora(rank=2, alpha=2, targets="all_linear")])
def test_checkpointing_changes_no_gradient(name, build, adapter):
    gradients = []
    for checkpointing in (False, True):
        model = SegmentationModel(adapter(build("quarters", checkpointing=checkpointing)), Head()).train()
        torch.manual_seed(1)
        sum(part.square().mean() for part in model.backbone(noise(1, (64, 96)))).backward()
        gradients.append({name: p.grad for name, p in model.backbone.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and gradients[0]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-4)


@with_weights
def test_blocks_are_in_order_and_end_with_the_last_one_read(build, name):
    whole, cut = build("quarters"), build([1], **({"patch_size": 8} if name in PYRAMIDS else {}))
    assert len(whole.blocks) == whole.depth and len(cut.blocks) == 2 and cut.depth == whole.depth
    if name not in PYRAMIDS:  # their stages are lists of modules, which are not called as such
        entered = []
        for number, block in enumerate(whole.blocks):
            block.register_forward_hook(lambda *_, number=number: entered.append(number))
        whole(noise(1, (64, 64)))
        assert entered == list(range(whole.depth))
    inside = {id(parameter) for block in whole.blocks for parameter in block.parameters()}
    assert sum(parameter.numel() for parameter in whole.parameters() if id(parameter) in inside) > 0.3 * sum(
        parameter.numel() for parameter in whole.parameters()
    )


@with_weights
@pytest.mark.parametrize("layers", [(-1,), [0, 1]])
def test_exported_weights_are_read_again(build, name, tmp_path, layers):
    from safetensors.torch import save_file

    strides = {"patch_size": 8} if name in PYRAMIDS and layers == [0, 1] else {}
    source = build(layers, **strides)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    save_file(source.export_state(), tmp_path / "weights.safetensors")
    images = noise(1, (64, 96))
    again = build(layers, weights=str(tmp_path / "weights.safetensors"), **strides)
    for ours, expected in zip(again(images), source(images), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("layers", [[99], [-99], [], "last"])
def test_layers_out_of_range_are_refused(build, layers):
    with pytest.raises(UserError, match="layers="):
        build(layers)


@pytest.mark.parametrize("patch_size", [0, -16])
def test_a_patch_size_below_one_is_refused(build, patch_size):
    with pytest.raises(UserError, match=f"^(backbone.)?patch_size={patch_size}.* (Give|set) "):
        build(patch_size=patch_size)


@pytest.mark.parametrize(
    ("key", "values", "rule"),
    [
        ("mean", [0.5, 0.5], "give 3 numbers"),
        ("mean", [], "give 3 numbers"),
        ("std", [0.2] * 4, "give 3 numbers"),
        (
            "mean",
            [0.5, float("nan"), 0.5],
            "Give a number from -1 to 2 .*divide statistics of 0..255 by 255.* for each",
        ),
        ("mean", [-1.5, 0, 0], "Give a number from -1 to 2 "),
        ("mean", [60000, 0, 0], "Give a number from -1 to 2 "),
        ("mean", [123.675, 116.28, 103.53], "Give a number from -1 to 2 "),
        ("std", [0.2, float("inf"), 0.2], "Give a number from 0.001 to 10 .* for each"),
        ("std", [0.2, 0.0, 0.2], "Give a number from 0.001 to 10 "),
        ("std", [-0.2, 0.2, 0.2], "Give a number from 0.001 to 10 "),
        ("std", [1e-300, 1, 1], "Give a number from 0.001 to 10 "),
        ("std", [10.5, 1, 1], "Give a number from 0.001 to 10 "),
        ("std", [58.395, 57.12, 57.375], "Give a number from 0.001 to 10 "),
    ],
)
def test_colours_that_cannot_be_are_refused(build, key, values, rule):
    with pytest.raises(UserError, match=rf"^(backbone\.)?{key}={re.escape(str(values))}.*{rule}"):
        build(**{key: values})


def test_every_backbone_option_belongs_to_a_tested_family():
    from config_files import options, read

    def base(option):
        started = [item for item in read("backbone", option).get("defaults", []) if isinstance(item, str)]
        bases = [item for item in started if item != "_self_"]
        return base(bases[0]) if bases else option

    covered = {base(option) for option, _ in (BACKBONES | WEIGHTLESS).values()}
    assert {base(option) for option in options("backbone")} == covered
