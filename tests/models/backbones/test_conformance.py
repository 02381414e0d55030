"""What every backbone promises to every head, whatever library it comes from."""

import re

import pytest
import torch
from omegaconf import OmegaConf
from tiny_parts import BACKBONES, PYRAMIDS, WEIGHTLESS, tiny_node
from torch import nn

from dinoseg.config.nodes import instantiate
from dinoseg.core.contracts import Head
from dinoseg.core.geometry import widths
from dinoseg.models.adapters import Full, Lora
from dinoseg.models.model import SegmentationModel
from dinoseg.testing import check_backbone
from dinoseg.utils.errors import UserError

RELATIVES = ("dino", "dinov2", "timm_pyramid")  # each like another family that is tried each time
NAMES = {
    name: pytest.param(name, marks=[pytest.mark.heavy] if name in RELATIVES else []) for name in BACKBONES | WEIGHTLESS
}
with_weights = pytest.mark.parametrize("name", [NAMES[name] for name in BACKBONES], indirect=True, scope="module")


@pytest.fixture(scope="module", params=NAMES.values())
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


@with_weights
@pytest.mark.parametrize(
    "adapter", [pytest.param(Full(), marks=pytest.mark.heavy), Lora(rank=2, alpha=2, targets="all_linear")]
)
def test_checkpointing_recomputes_and_changes_no_gradient(name, build, adapter):
    gradients, calls = [], []
    for checkpointing in (False, True):
        model = SegmentationModel(adapter(build("quarters", checkpointing=checkpointing)), Head()).train()
        layers = [part for part in model.backbone.blocks[1].modules() if isinstance(part, nn.Linear | nn.Conv2d)]
        layers[len(layers) // 2].register_forward_hook(lambda *_, recomputed=checkpointing: calls.append(recomputed))
        torch.manual_seed(1)
        sum(part.square().mean() for part in model.backbone(noise(1, (64, 96)))).backward()
        gradients.append({name: p.grad for name, p in model.backbone.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and gradients[0] and calls == [False, True, True]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-4)


@with_weights
def test_blocks_are_in_order_and_end_with_the_last_one_read(build, name):
    whole = build("quarters")
    cut = build([1], **({"patch_size": 8} if name in PYRAMIDS else {}))
    assert len(whole.blocks) == whole.depth and len(cut.blocks) == 2 and cut.depth == whole.depth
    entered = []
    images = noise(1, (64, 96))
    for number, block in enumerate(whole.blocks):
        block.register_forward_hook(lambda *_, number=number: entered.append(number))
    maps = whole(images)
    assert entered == ([] if name in PYRAMIDS else list(range(whole.depth)))  # lists of modules are not called as such
    inside = {parameter for block in whole.blocks for parameter in block.parameters()}
    counts = [sum(parameter.numel() for parameter in part) for part in (inside, whole.parameters(), cut.parameters())]
    assert counts[0] > 0.3 * counts[1] and counts[2] < counts[1]
    cut.load_state_dict({key: value for key, value in whole.state_dict().items() if key in cut.state_dict()})
    torch.testing.assert_close(cut(images)[0], maps[whole.layers.index(1)])


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


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [  # all layers: test_arch.py, all colours: test_colours.py
        ("layers", [-99], "this backbone has "),
        ("patch_size", 0, "(Give|set) "),
        ("mean", [0.5, 0.5], "give 3 numbers"),
        ("mean", [123.675, 116.28, 103.53], "Give a number from -1 to 2 "),
        ("std", [0.2, 0.0, 0.2], "Give a number from 0.001 to 10 "),
    ],
)
def test_values_out_of_range_are_refused(build, key, value, rule):
    with pytest.raises(UserError, match=rf"^(backbone\.)?{key}={re.escape(str(value))}.*{rule}"):
        build(**{key: value})


def test_every_backbone_option_belongs_to_a_tested_family():
    from config_files import options, read

    def base(option):
        started = [item for item in read("backbone", option).get("defaults", []) if isinstance(item, str)]
        bases = [item for item in started if item != "_self_"]
        return base(bases[0]) if bases else option

    covered = {base(option) for option, _ in (BACKBONES | WEIGHTLESS).values()}
    assert {base(option) for option in options("backbone")} == covered
