import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from dinoseg.models.adapters import Full, LastBlocks, Lora
from dinoseg.models.backbones.timm_backbone import TimmBackbone, find_unused_parameters
from dinoseg.utils.errors import UserError

pytestmark = pytest.mark.slow  # makes timm's own models

PLAIN = {  # patch size, blocks, width
    "test_vit": (16, 6, 64),
    "test_vit2": (16, 8, 64),  # a register, no class token; normed only after averaging
    "test_vit3": (16, 9, 96),  # attention pooling
    "eva02_tiny_patch14_224": (14, 12, 192),
    "deit_tiny_distilled_patch16_224": (16, 12, 192),  # two prefix tokens
}
PYRAMIDS = {  # patch size, stages, widths of `quarters`, strides of the same
    "test_convnext": (32, 4, [24, 32, 48, 64], [4, 8, 16, 32]),
    "test_resnet": (32, 5, [32, 48, 192, 96], [4, 8, 16, 32]),
    "test_efficientnet": (32, 5, [24, 32, 48, 64], [4, 8, 16, 32]),
    "swin_tiny_patch4_window7_224": (32, 4, [96, 192, 384, 768], [4, 8, 16, 32]),
}
SIZES = [(96, 96), (45, 61), (1, 1), (17, 200)]


def build(name="test_vit", layers=(-1,), weights="random", patch_size=None, **kwargs):
    torch.manual_seed(0)
    own = (PLAIN | PYRAMIDS)[name][0] if patch_size is None else patch_size
    return TimmBackbone(name, weights, own, layers, **kwargs)


def by_hand(backbone, images):
    """Normalise and pad without the backbone's help."""
    mean, std = (backbone.model.pretrained_cfg[key] for key in ("mean", "std"))
    pixels = (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    height, width = (-(-side // backbone.patch_size) * backbone.patch_size for side in images.shape[-2:])
    padded = torch.zeros(*images.shape[:2], height, width)
    padded[..., : images.shape[-2], : images.shape[-1]] = pixels
    return padded


@pytest.fixture(params=PLAIN)
def plain(request):
    return request.param


@pytest.fixture(params=PYRAMIDS)
def pyramid(request):
    return request.param


def test_maps_of_a_transformer_cover_any_size(plain):
    patch, depth, dim = PLAIN[plain]
    backbone = build(plain, (0, -1)).eval()
    assert (backbone.dim, backbone.num_layers, backbone.depth, len(backbone.blocks)) == (dim, 2, depth, depth)
    for height, width in SIZES:
        shapes = [tuple(part.shape) for part in backbone(torch.rand(2, 3, height, width))]
        assert shapes == [(2, dim, -(-height // patch), -(-width // patch))] * 2


def test_maps_of_a_pyramid_cover_any_size_each_on_its_grid(pyramid):
    patch, depth, widths, strides = PYRAMIDS[pyramid]
    backbone = build(pyramid, "quarters").eval()
    assert (backbone.dim, backbone.num_layers, backbone.depth, len(backbone.blocks)) == (widths, 4, depth, depth)
    for height, width in SIZES:
        padded = [-(-side // patch) * patch for side in (height, width)]
        shapes = [tuple(part.shape) for part in backbone(torch.rand(2, 3, height, width))]
        expected = zip(widths, strides, strict=True)
        assert shapes == [(2, dim, padded[0] // stride, padded[1] // stride) for dim, stride in expected]


def test_one_map_of_a_pyramid_has_one_width():
    assert build("test_convnext").dim == 64
    assert build("test_convnext", [1], patch_size=8).dim == 32
    assert build("test_convnext", [1, 0], patch_size=8).dim == [32, 24]


def test_last_map_equals_timm(plain):
    backbone = build(plain).eval()
    torch.manual_seed(0)
    theirs = timm.create_model(plain, num_classes=0, dynamic_img_size=True).eval()
    theirs.load_state_dict(backbone.model.state_dict(), strict=False)
    images = torch.rand(2, 3, 45, 61)
    pixels = by_hand(backbone, images)
    tokens = theirs.forward_features(pixels)[:, theirs.num_prefix_tokens :]
    grid = [side // backbone.patch_size for side in pixels.shape[-2:]]
    torch.testing.assert_close(backbone(images)[0], tokens.transpose(1, 2).unflatten(2, grid))


def test_positions_are_interpolated_as_in_timm():
    backbone = build().eval()
    own = backbone.model.pos_embed  # (1, 1 + 10 * 10, 64)
    grid = own[:, 1:].reshape(1, 10, 10, 64).permute(0, 3, 1, 2)
    fitted = F.interpolate(grid, (3, 13), mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
    seen = []
    backbone.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    images = torch.rand(1, 3, 48, 208)
    backbone(images)
    patches = backbone.model.patch_embed.proj(by_hand(backbone, images)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(seen[0][:, 1:], patches + fitted)


def test_each_tapped_layer_has_passed_the_final_norm():
    backbone = build(layers=(2, -1, 0)).eval()
    with torch.no_grad():
        backbone.norm.weight.uniform_(0.5, 2)
    outputs = {}
    for number, block in enumerate(backbone.blocks):
        block.register_forward_hook(lambda _, __, out, number=number: outputs.update({number: out}))
    maps = backbone(torch.rand(1, 3, 33, 70))
    for part, number in zip(maps, (2, 5, 0), strict=True):
        expected = backbone.norm(outputs[number])[:, 1:].transpose(1, 2).reshape(part.shape)
        torch.testing.assert_close(part, expected)


@pytest.mark.parametrize("name", ["test_vit", "deit_tiny_distilled_patch16_224"])
def test_maps_without_final_norm_are_the_outputs_of_blocks(name):
    backbone = build(name, (2, 0), final_norm=False).eval()
    assert not list(backbone.norm.parameters())
    outputs = {}
    for number, block in enumerate(backbone.blocks):
        block.register_forward_hook(lambda _, __, out, number=number: outputs.update({number: out}))
    images = torch.rand(2, 3, 33, 70)
    maps = backbone(images)
    for part, number in zip(maps, (2, 0), strict=True):
        tokens = outputs[number][:, backbone.model.num_prefix_tokens :]
        assert torch.equal(part, tokens.transpose(1, 2).reshape(part.shape))
    normed = build(name, (2, 0)).eval()
    normed.load_state_dict(backbone.state_dict(), strict=False)
    assert not torch.allclose(maps[0], normed(images)[0], atol=0.1)


@pytest.mark.parametrize("name", ["test_resnet", "swin_tiny_patch4_window7_224"])
def test_without_the_final_norm_a_pyramid_is_the_same(name):
    """A Swin's norm is of its classifier, and is cut off at any rate."""
    images = torch.rand(1, 3, 45, 61)
    with_norm, without = build(name).eval(), build(name, final_norm=False).eval()
    without.load_state_dict(with_norm.state_dict())
    assert torch.equal(with_norm(images)[0], without(images)[0]) and not with_norm.unused


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


def test_maps_of_a_pyramid_are_those_of_features_only(pyramid):
    backbone = build(pyramid, "quarters").eval()
    model = backbone.model
    images = torch.rand(1, 3, 70, 50)
    options = {"strict_img_size": False} if "swin" in pyramid else {}
    theirs = timm.create_model(pyramid, features_only=True, **options).eval()
    values = {name.replace(".", "_"): value for name, value in model.state_dict().items()}
    theirs.load_state_dict({name: values[name.replace(".", "_")] for name in theirs.state_dict()})
    maps = theirs(by_hand(backbone, images))[-4:]
    maps = [part.permute(0, 3, 1, 2) for part in maps] if "swin" in pyramid else maps
    for ours, expected in zip(backbone(images), maps, strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize(("name", "patch"), [("test_vit", 16), ("test_resnet", 8), ("test_vit2", 16)])
def test_early_layer_is_the_same_without_the_later_blocks(name, patch):
    images = torch.rand(1, 3, 64, 96)
    whole, cut = build(name, (2, -1)).eval(), build(name, (2,), patch_size=patch).eval()
    cut.load_state_dict({key: value for key, value in whole.state_dict().items() if key in cut.state_dict()})
    torch.testing.assert_close(cut(images)[0], whole(images)[0])
    assert sum(p.numel() for p in cut.parameters()) < sum(p.numel() for p in whole.parameters())
    assert len(cut.blocks) == 3


@pytest.mark.parametrize("name", ["test_vit", "test_vit3", "test_convnext", "test_resnet"])
def test_images_of_a_batch_are_independent_in_eval_mode(name):
    backbone = build(name).requires_grad_(False).eval()
    images = torch.rand(2, 3, 40, 33)
    both = backbone(images)[0]
    torch.testing.assert_close(both[1:], backbone(images[1:])[0], atol=1e-5, rtol=1e-4)
    assert torch.equal(both, backbone(images)[0]) and not both.requires_grad


def test_normalisation_is_timms_unless_given():
    images = torch.rand(1, 3, 16, 32)
    assert build().mean.flatten().tolist() == [0.5, 0.5, 0.5]
    assert build("test_efficientnet").std.flatten().tolist() == pytest.approx([0.229, 0.224, 0.225])
    given = build(mean=[0, 0, 0], std=[1, 2, 4]).eval()
    assert torch.equal(given.pixels(images), images / torch.tensor([1, 2, 4]).view(3, 1, 1))
    torch.testing.assert_close(build().pixels(images), 2 * images - 1)
    torch.testing.assert_close(given(images)[0], build().eval()((given.pixels(images) + 1) / 2)[0])


def test_padding_is_the_mean_colour():
    images = torch.full((1, 3, 17, 20), 0.5)
    assert torch.equal(build().pixels(images), torch.zeros(1, 3, 32, 32))


def test_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        backbone = build(checkpointing=checkpointing).train()
        calls = []
        backbone.blocks[2].register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        backbone(torch.ones(1, 3, 16, 32))[0].square().sum().backward()
        gradients.append(backbone.model.patch_embed.proj.weight.grad)
        assert len(calls) == 1 + checkpointing
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("name", ["test_vit", "test_vit2", "test_convnext", "test_resnet", "test_efficientnet"])
def test_every_parameter_has_a_gradient(name):
    backbone = Full()(build(name, "quarters")).train()
    sum(part.square().sum() for part in backbone(torch.rand(2, 3, 64, 96))).backward()
    without = [key for key, parameter in backbone.named_parameters() if parameter.grad is None]
    assert without == list(backbone.unused) == []


def test_parameters_of_the_classifier_alone_are_unused():
    backbone = build("efficientvim_m1", patch_size=64)
    backbone.train()(torch.rand(2, 3, 64, 128))[0].square().sum().backward()
    without = [key for key, parameter in backbone.named_parameters() if parameter.grad is None]
    assert without == list(backbone.unused) == ["model.weights"]


def test_unused_parameters_are_found():
    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(2, 2), nn.Linear(2, 2)
            self.token = nn.Parameter(torch.zeros(2))

        def forward(self, x):
            return self.used(x) + self.idle(x).detach()

    part = Part()
    assert find_unused_parameters(part, [part(torch.ones(1, 2))]) == ["token", "idle.weight", "idle.bias"]


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
    called, given = set(), nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: called.add(self) or given(self, x))
    backbone(torch.rand(1, 3, 45, 61))
    linears = {key: part for key, part in backbone.named_modules() if isinstance(part, nn.Linear)}
    assert backbone.uncalled_linears == {key for key, part in linears.items() if part not in called}
    assert backbone.uncalled_linears == {key for key in linears if own and key.endswith(own)}
    assert bool(backbone.uncalled_linears) == bool(own) and called
    assert not any(part._forward_hooks for part in linears.values())


def test_lora_finds_fused_projections_and_last_blocks_its_blocks():
    lora = Lora(rank=2, alpha=2)(build())
    trained = {name for name, parameter in lora.named_parameters() if parameter.requires_grad}
    assert len(trained) == 6 * 2 * 2 and all("attn.qkv" in name or "attn.proj" in name for name in trained)
    with pytest.raises(UserError, match="LoRA updates.*merge=true"):
        lora.export_state()
    last = LastBlocks(1)(build("test_resnet"))
    trained = {name for name, parameter in last.named_parameters() if parameter.requires_grad}
    assert trained and all(name.startswith("model.layer4.") for name in trained)


def test_unknown_names_are_refused_with_the_nearest():
    for name in ("vit_tini_patch16_224", "vit_tini_patch16_224.augreg"):
        with pytest.raises(UserError, match=rf"name={name} is not a model.*Did you mean .*vit_tiny_patch16_224"):
            build(name, patch_size=16)
    with pytest.raises(UserError, match="is not a model of timm .*list_models"):
        build("qqqq", patch_size=16)
    with pytest.raises(UserError, match="does not have this tag. It has test_vit.r160_in1k"):
        build("test_vit.nothing", patch_size=16)


def test_a_tag_may_stand_behind_the_name():
    assert build("test_vit.r160_in1k", patch_size=16).dim == 64


def test_another_patch_size_is_refused_with_the_right_one():
    with pytest.raises(UserError, match=r"patch_size=14: test_vit has patches of 16 px: set patch_size=16"):
        build(patch_size=14)
    with pytest.raises(UserError, match=r"patch_size=16: test_convnext has a stride of 32 px .*set .*patch_size=32"):
        build("test_convnext", patch_size=16)
    with pytest.raises(UserError, match=r"has a stride of 8 px at the coarsest.*set patch_size=8"):
        build("test_convnext", (0, 1), patch_size=32)


def test_models_of_one_image_size_are_refused():
    for name, patch in (("mixer_s32_224", 32), ("test_vit_relpos", 16), ("test_maxvit", 32)):
        with pytest.raises(UserError, match=f"name={name}: this model does not support arbitrary image sizes .*Choose"):
            build(name, patch_size=patch)


def test_layers_out_of_range_are_refused_with_the_range():
    with pytest.raises(UserError, match="this backbone has 6 blocks.*from -6 to 5"):
        build(layers=(6,))


def test_failed_download_suggests_a_local_path(monkeypatch):
    def fail(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr("timm.models._builder.load_pretrained", fail)
    with pytest.raises(UserError, match=r"test_vit cannot be downloaded \(no route to host\).*weights=PATH"):
        build(weights="timm")
    with pytest.raises(UserError, match="weights=timm: timm has no weights for levit_512"):
        build("levit_512", weights="timm", patch_size=64)


def test_model_without_checkpointing_is_refused():
    with pytest.raises(
        UserError,
        match="checkpointing=true: dla46_c does not support activation checkpointing. Set it to false",
    ):
        build("dla46_c", patch_size=32, checkpointing=True)


def test_backbone_builds_on_the_meta_device():
    with torch.device("meta"):
        backbone = build("vit_large_patch16_224", "quarters", patch_size=16)
    assert (backbone.dim, backbone.layers) == (1024, [4, 11, 17, 23])
    assert sum(parameter.numel() for parameter in backbone.parameters()) == 303_301_632


@pytest.mark.parametrize(("name", "own"), [("test_vit", 16), ("test_convnext", 32), ("resnet18", 32)])
def test_the_patch_size_is_the_models_own_where_none_is_given(name, own):
    assert TimmBackbone(name, "random", None).patch_size == own
