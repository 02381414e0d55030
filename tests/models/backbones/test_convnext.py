import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import save_file
from timm.models.convnext import ConvNeXt, checkpoint_filter_fn

from dinoseg.__main__ import CONFIGS
from dinoseg.models.adapters import Full, LastBlocks, Lora
from dinoseg.models.backbones.convnext import ConvNext
from dinoseg.models.backbones.pretrained import convnext_names, is_meta_convnext
from dinoseg.utils.errors import UserError

WIDTHS = [8, 12, 16, 24]
DEPTHS = [1, 2, 2, 1]
ARCH = {"depths": DEPTHS, "hidden_sizes": WIDTHS, "layer_scale_init_value": 0.5}
STRIDES = [4, 8, 16, 32]


def build(layers=(-1,), weights="random", patch_size=32, arch=ARCH, **kwargs):
    torch.manual_seed(0)
    return ConvNext(arch, weights, patch_size, layers, **kwargs)


def shaken(layers=(-1,), **kwargs):
    """Build one in which no two tensors are alike."""
    backbone = build(layers, **kwargs)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.2 * torch.rand_like(parameter))
    return backbone.eval()


def meta_state():
    """Return tensors under the names and in the shapes of Meta's file."""
    torch.manual_seed(1)
    shapes = {}
    for stage, (width, depth) in enumerate(zip(WIDTHS, DEPTHS, strict=True)):
        before = WIDTHS[stage - 1] if stage else 3
        conv = {"weight": (width, before, *([2, 2] if stage else [4, 4])), "bias": (width,)}
        norm = {"weight": (before if stage else width,), "bias": (before if stage else width,)}
        for number, part in enumerate([norm, conv] if stage else [conv, norm]):
            shapes |= {f"downsample_layers.{stage}.{number}.{key}": shape for key, shape in part.items()}
        for block in range(depth):
            inside = {
                "gamma": (width,),
                "dwconv.weight": (width, 1, 7, 7),
                "dwconv.bias": (width,),
                "norm.weight": (width,),
                "norm.bias": (width,),
                "pwconv1.weight": (4 * width, width),
                "pwconv1.bias": (4 * width,),
                "pwconv2.weight": (width, 4 * width),
                "pwconv2.bias": (width,),
            }
            shapes |= {f"stages.{stage}.{block}.{key}": shape for key, shape in inside.items()}
    shapes |= {"norm.weight": (WIDTHS[-1],), "norm.bias": (WIDTHS[-1],)}
    state = {key: 0.3 * torch.randn(shape) for key, shape in shapes.items()}
    return state | {"norms.3.weight": state["norm.weight"].clone(), "norms.3.bias": state["norm.bias"].clone()}


def pad_by_hand(images):
    """Normalise and pad without the backbone's help."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = (images - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    height, width = (-(-side // 32) * 32 for side in images.shape[-2:])
    whole = torch.zeros(*images.shape[:2], height, width)
    whole[..., : images.shape[-2], : images.shape[-1]] = pixels
    return whole


@pytest.mark.parametrize("size", [(64, 64), (45, 61), (1, 1), (33, 130)])
def test_maps_cover_any_size_each_stage_on_its_grid(size):
    backbone = build("quarters").eval()
    maps = backbone(torch.rand(2, 3, *size))
    height, width = (-(-side // 32) * 32 for side in size)
    expected = [(2, dim, height // stride, width // stride) for dim, stride in zip(WIDTHS, STRIDES, strict=True)]
    assert [tuple(part.shape) for part in maps] == expected
    assert (backbone.dim, backbone.num_layers, backbone.depth, len(backbone.blocks)) == (WIDTHS, 4, 4, 4)
    assert build().dim == 24 and build([0, 1], patch_size=8).dim == [8, 12]


def test_the_last_map_is_the_models_own_output():
    backbone = shaken()
    images = torch.rand(2, 3, 45, 70)
    tokens = backbone.model(pad_by_hand(images)).last_hidden_state[:, 1:]  # without the averaged one
    torch.testing.assert_close(backbone(images)[0], tokens.transpose(1, 2).unflatten(2, (2, 3)))


def test_metas_file_gives_the_maps_of_timms_convnext(tmp_path):
    state = meta_state()
    torch.save(state, tmp_path / "dinov3_convnext.pth")
    backbone = build([3, 0, 2], weights=str(tmp_path / "dinov3_convnext.pth")).eval()
    theirs = ConvNeXt(depths=DEPTHS, dims=WIDTHS, num_classes=0, ls_init_value=0.5).eval()
    theirs.load_state_dict(checkpoint_filter_fn(dict(state), theirs))
    images = torch.rand(2, 3, 50, 90)
    maps = theirs.forward_intermediates(pad_by_hand(images), intermediates_only=True)
    last = F.layer_norm(maps[3].permute(0, 2, 3, 1), (24,), state["norm.weight"], state["norm.bias"], 1e-6)
    for ours, expected in zip(backbone(images), [last.permute(0, 3, 1, 2), maps[0], maps[2]], strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


def test_metas_names_are_all_known():
    state = meta_state()
    hub = convnext_names(state)
    assert is_meta_convnext(state) and not is_meta_convnext(hub)
    assert hub.keys() == build().export_state().keys()
    assert sum(value.numel() for value in hub.values()) == sum(p.numel() for p in build().parameters())


def test_a_key_too_much_or_too_few_in_metas_file_is_named(tmp_path):
    file = tmp_path / "meta.pth"
    state = meta_state()
    for changed, name in (
        (state | {"stages.0.0.grn.gamma": torch.zeros(8)}, "stages.0.0.grn.gamma"),
        (state | {"norms.3.bias": torch.zeros(24)}, "norms.3.bias"),
        (state | {"norms.2.bias": torch.zeros(16)}, "norms.2.bias"),
        ({key: value for key, value in state.items() if key != "stages.2.1.gamma"}, "stages.2.layers.1.gamma"),
    ):
        torch.save(changed, file)
        with pytest.raises(UserError, match=rf"meta\.pth: 1 tensors are missing, unexpected.*{name}"):
            build(weights=str(file))


def test_an_earlier_stage_is_the_same_without_those_after_it():
    images = torch.rand(1, 3, 32, 64)
    whole, cut = shaken((1, 3)), build((1,), patch_size=8).eval()
    cut.load_state_dict({key: value for key, value in whole.state_dict().items() if key in cut.state_dict()})
    torch.testing.assert_close(cut(images)[0], whole(images)[0])
    assert len(cut.blocks) == 2 and cut.norm is None and "layer_norm.weight" not in cut.export_state()


def test_images_of_a_batch_are_independent_in_eval_mode():
    backbone = shaken("quarters", arch=ARCH | {"drop_path_rate": 0.5}).requires_grad_(False)
    images = torch.rand(2, 3, 40, 33)
    both, again = backbone(images), backbone(images)
    for part, same, alone in zip(both, again, backbone(images[1:]), strict=True):
        assert torch.equal(part, same)
        torch.testing.assert_close(part[1:], alone, atol=1e-5, rtol=1e-4)


def test_stochastic_depth_acts_only_if_configured():
    images = torch.rand(4, 3, 32, 32)
    still = build().train()
    assert torch.equal(still(images)[0], still(images)[0])
    noisy = build(arch=ARCH | {"drop_path_rate": 0.9}).train()
    assert not torch.equal(noisy(images)[0], noisy(images)[0])


def test_normalisation_is_inside():
    given = build(mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7)).eval()
    none = build(mean=(0, 0, 0), std=(1, 1, 1)).eval()
    images = torch.rand(1, 3, 32, 64)
    by_hand = (images - torch.tensor((0.1, 0.2, 0.3)).view(3, 1, 1)) / torch.tensor((0.5, 0.6, 0.7)).view(3, 1, 1)
    torch.testing.assert_close(given(images)[0], none(by_hand)[0])
    odd = torch.rand(2, 3, 33, 40)
    torch.testing.assert_close(build().pixels(odd), pad_by_hand(odd))


def test_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        backbone = build(checkpointing=checkpointing).train()
        calls = []
        backbone.blocks[1].layers[0].register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        backbone(torch.ones(1, 3, 32, 64))[0].square().sum().backward()
        gradients.append([parameter.grad for parameter in backbone.parameters()])
        assert len(calls) == 1 + checkpointing
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize(("layers", "patch_size"), [("quarters", 32), ((-1,), 32), ((0, 2), 16)])
def test_every_parameter_has_a_gradient(layers, patch_size):
    backbone = Full()(build(layers, patch_size=patch_size)).train()
    sum(part.square().sum() for part in backbone(torch.rand(2, 3, 64, 96))).backward()
    assert [name for name, parameter in backbone.named_parameters() if parameter.grad is None] == backbone.unused == []


def test_lora_finds_its_linear_layers_and_last_blocks_its_stages():
    lora = Lora(rank=2, alpha=2, targets="all_linear")(build())
    trained = [name for name, parameter in lora.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 2 * sum(DEPTHS) and all("pointwise_conv" in name for name in trained)
    with pytest.raises(UserError, match="LoRA updates"):
        lora.export_state()
    with pytest.raises(UserError, match="targets=attention matches no linear layer.*pointwise_conv1"):
        Lora(rank=2, alpha=2)(build())
    last = LastBlocks(1)(build())
    trained = {name for name, parameter in last.named_parameters() if parameter.requires_grad}
    assert trained and all(name.startswith(("model.model.stages.3.", "model.layer_norm.")) for name in trained)


def test_weights_from_a_file_and_a_folder(tmp_path):
    source = shaken("quarters")
    save_file(source.export_state(), tmp_path / "weights.safetensors")
    source.model.save_pretrained(tmp_path / "folder")
    images = torch.rand(1, 3, 40, 40)
    for weights in (tmp_path / "weights.safetensors", tmp_path / "folder"):
        loaded = build("quarters", weights=str(weights)).eval()
        for ours, expected in zip(loaded(images), source(images), strict=True):
            torch.testing.assert_close(ours, expected)


def test_weights_of_another_size_are_refused(tmp_path):
    save_file(shaken().export_state(), tmp_path / "other.safetensors")
    for arch in (ARCH | {"depths": [1, 2, 3, 1]}, ARCH | {"hidden_sizes": [8, 12, 16, 32]}):
        with pytest.raises(UserError, match=r"other\.safetensors: .*Choose the backbone"):
            build(weights=str(tmp_path / "other.safetensors"), arch=arch)


@pytest.mark.parametrize(("layers", "given", "own"), [((-1,), 16, 32), ((0, 2), 32, 16), ((0,), 8, 4)])
def test_another_patch_size_is_refused_with_the_right_one(layers, given, own):
    with pytest.raises(UserError, match=rf"patch_size={given}: .*stride of {own} px: set patch_size={own}"):
        build(layers, patch_size=given)


def test_layers_out_of_range_and_unknown_keys_are_refused():
    with pytest.raises(UserError, match="this backbone has 4 blocks.*from -4 to 3"):
        build((4,))
    with pytest.raises(UserError, match="arch: dinov3_convnext has no depth, width"):
        build(arch=ARCH | {"width": 3, "depth": 3})


@pytest.mark.parametrize(
    ("size", "parameters"),
    [("tiny", 27_820_128), ("small", 49_454_688), ("base", 87_566_464), ("large", 196_230_336)],
)
def test_published_sizes(compose, size, parameters):
    from hydra.utils import instantiate

    cfg = compose(f"backbone=dinov3_convnext_{size}", "backbone.weights=random", "data=folder")
    with torch.device("meta"):
        backbone = instantiate(cfg.backbone, _convert_="all")
    assert sum(parameter.numel() for parameter in backbone.parameters()) == parameters
    assert backbone.patch_size == 32
    with open(f"{CONFIGS}/backbone/dinov3_convnext_{size}.yaml", encoding="utf-8") as file:
        assert yaml.safe_load(file)["weights"] == f"facebook/dinov3-convnext-{size}-pretrain-lvd1689m"
