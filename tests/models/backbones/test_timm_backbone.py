from collections import OrderedDict
from functools import partial

import pytest
import timm
import torch
from mistakes import assert_refused, refusals
from safetensors.torch import save_file
from torch import nn

from dinoseg.core.geometry import pad_to_multiple
from dinoseg.models.adapters import Full, LastBlocks, Lora
from dinoseg.models.backbones.timm_backbone import TimmBackbone, stages
from dinoseg.utils.errors import UserError

pytestmark = pytest.mark.slow  # makes timm's own models

PLAIN = {  # patch size, blocks, width
    "test_vit": (16, 6, 64),
    "test_vit2": (16, 8, 64),  # a register, no class token; normed only after averaging
    "test_vit3": (16, 9, 96),  # attention pooling
    "eva02_tiny_patch14_224": (14, 12, 192),
    "deit_tiny_distilled_patch16_224": (16, 12, 192),  # two prefix tokens
}
PYRAMIDS = {  # stride, stages, widths of `quarters`
    "test_convnext": (32, 4, [24, 32, 48, 64]),
    "test_resnet": (32, 5, [32, 48, 192, 96]),
    "test_efficientnet": (32, 5, [24, 32, 48, 64]),
    "swin_tiny_patch4_window7_224": (32, 4, [96, 192, 384, 768]),
}


def build(name="test_vit", layers=(-1,), weights="random", patch_size=None, **kwargs):
    torch.manual_seed(0)
    return TimmBackbone(name, str(weights), patch_size, layers, **kwargs)


def by_hand(backbone, images):
    """Normalise and pad without the backbone's help."""
    mean, std = (torch.tensor(backbone.model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    return pad_to_multiple((images - mean) / std, backbone.patch_size)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.heavy] if name.startswith("eva02") else []) for name in PLAIN]
)
def test_last_map_equals_timm(name):
    patch, depth, dim = PLAIN[name]
    backbone = build(name).eval()
    assert (backbone.patch_size, backbone.dim, backbone.depth, len(backbone.blocks)) == (patch, dim, depth, depth)
    torch.manual_seed(0)
    theirs = timm.create_model(name, num_classes=0, dynamic_img_size=True).eval()
    theirs.load_state_dict(backbone.model.state_dict(), strict=False)
    images = torch.rand(2, 3, 45, 61)
    pixels = by_hand(backbone, images)
    tokens = theirs.forward_features(pixels)[:, theirs.num_prefix_tokens :]
    grid = [side // backbone.patch_size for side in pixels.shape[-2:]]
    torch.testing.assert_close(backbone(images)[0], tokens.transpose(1, 2).unflatten(2, grid))


def test_without_the_final_norm_a_pyramid_is_the_same():
    images = torch.rand(1, 3, 45, 61)
    with_norm = build("test_resnet").eval()
    without = build("test_resnet", final_norm=False).eval()
    without.load_state_dict(with_norm.state_dict())
    assert torch.equal(with_norm(images)[0], without(images)[0]) and not with_norm.unused and with_norm.dim == 96


@pytest.mark.parametrize("adapter", [Full(), LastBlocks(blocks=1)])
def test_trained_blocks_resume_from_the_cut_without_final_norm(adapter):
    backbone = adapter(build(layers=(1, -1), final_norm=False))
    images = torch.rand(1, 3, 33, 40)
    whole = backbone(images)
    cut = backbone.forward_trainable(backbone.forward_frozen(images), (33, 40))
    assert all(torch.equal(a, b) for a, b in zip(whole, cut, strict=True))
    sum(part.square().sum() for part in cut).backward()
    trained = [name for name, part in backbone.named_parameters() if part.requires_grad]
    assert all(part.grad is not None for name, part in backbone.named_parameters() if name in trained)
    assert not any(name.startswith("model.norm.") for name in trained)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.heavy] if name.startswith("swin") else []) for name in PYRAMIDS]
)
def test_maps_of_a_pyramid_are_those_of_features_only(name):
    patch, depth, widths = PYRAMIDS[name]
    backbone = build(name, "quarters").eval()
    assert (backbone.patch_size, backbone.dim, backbone.depth, len(backbone.blocks)) == (patch, widths, depth, depth)
    images = torch.rand(1, 3, 70, 50)
    options = {"strict_img_size": False} if "swin" in name else {}
    theirs = timm.create_model(name, features_only=True, **options).eval()
    values = {key.replace(".", "_"): value for key, value in backbone.model.state_dict().items()}
    theirs.load_state_dict({key: values[key.replace(".", "_")] for key in theirs.state_dict()})
    maps = theirs(by_hand(backbone, images))[-4:]
    maps = [part.permute(0, 3, 1, 2) for part in maps] if "swin" in name else maps
    for ours, expected in zip(backbone(images), maps, strict=True):
        torch.testing.assert_close(ours, expected)


def test_normalisation_is_timms_unless_given():
    assert build("test_vit.r160_in1k").mean.flatten().tolist() == [0.5, 0.5, 0.5]  # a tag may follow the name
    assert build("test_efficientnet").std.flatten().tolist() == pytest.approx([0.229, 0.224, 0.225])


def test_parameters_of_the_classifier_alone_are_unused():
    backbone = build("efficientvim_m1", patch_size=64)
    backbone.train()(torch.rand(2, 3, 64, 128))[0].square().sum().backward()
    without = [key for key, parameter in backbone.named_parameters() if parameter.grad is None]
    assert without == list(backbone.unused) == ["model.weights"]


@pytest.mark.parametrize(
    ("name", "patch", "own"),
    [
        ("eva02_tiny_patch14_224", 14, ".attn.qkv"),
        ("swinv2_tiny_window8_256", 8, ".attn.qkv"),
        ("test_vit", 16, None),
        ("test_convnext", 8, None),
    ],
)
def test_linear_layers_used_only_by_weight_are_listed(name, patch, own, monkeypatch):
    backbone = build(name, (1,), patch_size=patch)
    called = set()
    given = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: called.add(self) or given(self, x))
    backbone(torch.rand(1, 3, 45, 61))
    linears = {key: part for key, part in backbone.named_modules() if isinstance(part, nn.Linear)}
    assert backbone.uncalled_linears == {key for key, part in linears.items() if part not in called}
    assert backbone.uncalled_linears == {key for key in linears if own and key.endswith(own)}
    assert bool(backbone.uncalled_linears) == bool(own) and called
    assert not any(part._forward_hooks for part in linears.values())


def test_last_blocks_trains_the_last_stage_of_a_pyramid():
    last = LastBlocks(1)(build("test_resnet"))
    trained = {name for name, parameter in last.named_parameters() if parameter.requires_grad}
    assert trained and all(name.startswith("model.layer4.") for name in trained)


def test_failed_download_suggests_a_local_path(monkeypatch):
    def fail(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(timm, "create_model", fail)
    assert_refused(lambda: build(weights="timm"), "test_vit cannot be downloaded (no route to host)", "weights=PATH")


def test_backbone_builds_on_the_meta_device():
    with torch.device("meta"):
        backbone = build("vit_large_patch16_224", "quarters", patch_size=16)
    assert (backbone.dim, backbone.layers) == (1024, [4, 11, 17, 23])
    assert sum(parameter.numel() for parameter in backbone.parameters()) == 303_301_632


@pytest.mark.parametrize("final_norm", [True, False])
def test_tapped_layers_pass_the_final_norm_unless_it_is_off(final_norm):
    backbone = build("deit_tiny_distilled_patch16_224", layers=(2, -1, 0), final_norm=final_norm).eval()
    assert bool(list(backbone.norm.parameters())) == final_norm
    for parameter in backbone.norm.parameters():
        nn.init.uniform_(parameter, 0.5, 2)
    outputs = []
    for block in backbone.blocks:
        block.register_forward_hook(lambda _, __, out: outputs.append(out))
    maps = backbone(torch.rand(2, 3, 33, 70))
    for part, number in zip(maps, (2, 11, 0), strict=True):
        tokens = backbone.norm(outputs[number])[:, backbone.model.num_prefix_tokens :]
        torch.testing.assert_close(part, tokens.transpose(1, 2).reshape(part.shape))


FIXED = "this model does not support arbitrary image sizes "
test_message_names_value_and_remedy = refusals(
    {
        name: (partial(TimmBackbone, name, "random", None), f"name={name}: {FIXED}", "Choose")
        for name in ("mixer_s32_224", "test_vit_relpos")
    }
    | {
        "patches": (partial(build, patch_size=14), "patch_size=14: test_vit has patches of 16 px: set patch_size=16"),
        "stride": (partial(build, "test_convnext", patch_size=16), "patch_size=16: ", "of 32 px", "patch_size=32"),
        "stride of two": (partial(build, "test_convnext", (0, 1), patch_size=32), "of 8 px at", "set patch_size=8"),
        "no weights": (partial(build, "levit_512", weights="timm"), "weights=timm: ", "weights exist for levit_512"),
        "LoRA exported": (lambda: Lora(2, 2)(build()).export_state(), "LoRA updates", "merge=true"),
    }
)


def toy():
    lists = nn.Sequential(OrderedDict(a=nn.Conv2d(1, 1, 1), b=nn.Conv2d(1, 1, 1), c=nn.Conv2d(1, 1, 1)))
    return nn.Sequential(OrderedDict(stem=nn.Conv2d(3, 1, 1), act=nn.ReLU(), blocks=lists, tail=nn.Conv2d(1, 1, 1)))


def test_a_stage_is_all_that_runs_since_the_tap_before():
    model = toy()
    found = stages(model, ["act", "blocks.b", "blocks"])
    assert [list(stage) for stage in found] == [
        [model.stem, model.act],
        [model.blocks.a, model.blocks.b],
        [model.blocks.c],
    ]
    assert len(stages(model, ["tail"])[0]) == 6


def test_tap_can_be_inside_a_module():
    model = toy()
    model.stem = nn.Identity()
    model.stem.inner = nn.ReLU()
    assert list(stages(model, ["stem.inner", "act"])[0]) == [model.stem]


def test_names_that_the_model_does_not_have_make_it_one_stage():
    model = toy()
    for taps in (["block.0", "block.1"], ["act", "stages.0"], ["blocks.b", "act"], ["stem.x", "stem.y"], ["bloc"]):
        assert stages(model, taps) == [model]


def test_the_stages_of_an_efficientnet_leave_no_block_out():
    model = timm.create_model("test_efficientnet", num_classes=0)
    found = stages(model, [note["module"] for note in model.feature_info])
    inside = {parameter for stage in found for parameter in stage.parameters()}
    outside = [name for name, parameter in model.named_parameters() if parameter not in inside]
    assert all(name.startswith(("conv_head", "bn2")) for name in outside) and len(found) == 5


@pytest.mark.parametrize(
    "name",
    [
        "test_vit",
        "test_vit2",
        "test_convnext",
        pytest.param("deit_tiny_distilled_patch16_224", marks=pytest.mark.heavy),
    ],
)
def test_a_classifiers_file_loads_whole_and_cut(tmp_path, name):
    torch.manual_seed(1)
    classifier = timm.create_model(name, num_classes=7).state_dict()
    save_file(classifier | {"mask_token": torch.zeros(1)}, tmp_path / "classifier.safetensors")
    torch.save({"state_dict": classifier, "step": 3}, tmp_path / "classifier.pth")
    for file, layers in (("classifier.safetensors", (-1,)), ("classifier.pth", (1,))):
        loaded = build(name, layers, tmp_path / file)
        assert len(loaded.blocks) == loaded.layers[0] + 1
        for key, value in loaded.model.state_dict().items():
            assert torch.equal(value, classifier[key])


def test_weights_load_and_export_without_the_final_norm(tmp_path):
    whole, cut = tmp_path / "whole.safetensors", tmp_path / "cut.safetensors"
    save_file(timm.create_model("test_vit", num_classes=7).state_dict(), whole)
    loaded = build(weights=whole, final_norm=False)
    save_file(loaded.export_state(), cut)
    build(weights=cut, final_norm=False)
    with pytest.raises(RuntimeError, match="norm.weight.*norm.bias"):
        build(weights=cut)


@pytest.mark.parametrize(("fault", "said"), [(torch.int8, "is int8"), (None, "holds NaN or infinity")])
def test_weights_that_are_not_finite_floats_are_refused_by_file(tmp_path, monkeypatch, fault, said):
    file = tmp_path / "w.safetensors"
    state = build("test_resnet").export_state()  # with counters of batches, which are whole numbers
    save_file(state, file)
    build("test_resnet", weights=file)
    name = next(name for name, value in state.items() if value.ndim == 4)
    save_file(state | {name: state[name].to(fault) if fault else state[name] / 0}, file)
    with pytest.raises(UserError, match=rf"^weights={file}: {name} {said}"):
        build("test_resnet", weights=file)
    spoilt = build("test_resnet").model
    torch.nn.init.constant_(next(spoilt.parameters()), float("nan"))
    monkeypatch.setattr(timm, "create_model", lambda name, **_: spoilt)
    with pytest.raises(UserError, match=r"^weights=timm \(test_resnet\): .* holds NaN"):
        build("test_resnet", weights="timm")


def load_changed(tensors):
    """Load a model's tensors with others added, or left out where None."""
    state = build().export_state() | tensors
    load_saved({name: value for name, value in state.items() if value is not None})


def load_saved(content):
    torch.save(content, "w.pth")
    build(weights="w.pth")


ONE = torch.zeros(1)
test_message_names_file_and_tensors = refusals(
    {
        "no file": (partial(build, weights="nowhere.pth"), "nowhere.pth: file not found"),
        "int8": (partial(load_changed, {"norm.bias": torch.zeros(64, dtype=torch.int8)}), "w.pth: norm.bias is int8"),
    }
)


@pytest.mark.parametrize("name", ["norm.bias", "extra", "head2.weight", "pos_embed"])
def test_a_missing_additional_or_misshapen_tensor_is_named(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tensor = None if name == "norm.bias" else ONE
    with pytest.raises(RuntimeError, match=name):
        load_changed({name: tensor})


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("vit_tiny_patch16_224x", "Did you mean vit_tiny_patch16_224 or"),
        ("vit_tiny_patch16_224.augreg_in21", "Did you mean vit_tiny_patch16_224.augreg_in21k"),
        ("zzz", "$"),
    ],
)
@pytest.mark.parametrize("weights", ["random", "timm"])
def test_unknown_names_are_refused_with_suggestions(name, suggestion, weights):
    with pytest.raises(UserError, match=rf"^name={name} is unknown to timm.*{suggestion}"):
        TimmBackbone(name, weights, None)


def test_deprecated_names_are_known():
    with pytest.warns(UserWarning, match="vit_tiny_patch16_224.augreg_in21k"):
        assert TimmBackbone("vit_tiny_patch16_224_in21k", "random", None).dim == 192
