from functools import partial

import pytest
import torch
import torch.nn.functional as F
from mistakes import refusals
from timm.models.convnext import ConvNeXt, checkpoint_filter_fn

from dinoseg.core.geometry import pad_to_multiple
from dinoseg.models.adapters import LastBlocks, Lora
from dinoseg.models.backbones.convnext import ConvNext
from dinoseg.utils.errors import UserError

WIDTHS = [8, 12, 16, 24]
DEPTHS = [1, 2, 2, 1]
ARCH = {"depths": DEPTHS, "hidden_sizes": WIDTHS, "layer_scale_init_value": 0.5}


def build(layers=(-1,), weights="random", patch_size=32, arch=ARCH):
    torch.manual_seed(0)
    return ConvNext(arch, weights, patch_size, layers)


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


def test_only_the_last_stage_has_the_final_norm():
    assert build().dim == 24 and build([0, 1], patch_size=8).dim == [8, 12]
    cut = build((1,), patch_size=8)
    assert cut.norm is None and "layer_norm.weight" not in cut.export_state()


def test_metas_file_gives_the_maps_of_timms_convnext(tmp_path):
    state = meta_state()
    torch.save(state, tmp_path / "dinov3_convnext.pth")
    backbone = build([3, 0, 2], weights=str(tmp_path / "dinov3_convnext.pth")).eval()
    theirs = ConvNeXt(depths=DEPTHS, dims=WIDTHS, num_classes=0, ls_init_value=0.5).eval()
    theirs.load_state_dict(checkpoint_filter_fn(dict(state), theirs))
    images = torch.rand(2, 3, 50, 90)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    maps = theirs.forward_intermediates(pad_to_multiple((images - mean) / std, 32), intermediates_only=True)
    last = F.layer_norm(maps[3].permute(0, 2, 3, 1), (24,), state["norm.weight"], state["norm.bias"], 1e-6)
    for ours, expected in zip(backbone(images), [last.permute(0, 3, 1, 2), maps[0], maps[2]], strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


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


def test_last_blocks_trains_the_last_stage_and_the_norm():
    last = LastBlocks(1)(build())
    trained = {name for name, parameter in last.named_parameters() if parameter.requires_grad}
    assert trained and all(name.startswith(("model.model.stages.3.", "model.layer_norm.")) for name in trained)


test_message_names_value_and_remedy = refusals(
    {
        "stride of the last stage": (partial(build, patch_size=16), "patch_size=16: ", "32 px: set patch_size=32"),
        "stride of two stages": (partial(build, (0, 2)), "patch_size=32: ", "stride of 16 px: set patch_size=16"),
        "unknown keys": (partial(build, arch={"width": 3, "depth": 3}), "arch: dinov3_convnext has no depth, width"),
        "LoRA exported": (lambda: Lora(2, 2, targets="all_linear")(build()).export_state(), "LoRA updates"),
        "LoRA of attention": (lambda: Lora(2, 2)(build()), "targets=attention matches no linear", "pointwise_conv1"),
    }
)


def test_stochastic_depth_acts_in_training_if_configured():
    images = torch.rand(4, 3, 32, 32)
    still = build().train()
    noisy = build(arch=ARCH | {"drop_path_rate": 0.9}).train()
    assert torch.equal(still(images)[0], still(images)[0])
    assert not torch.equal(noisy(images)[0], noisy(images)[0])
    assert torch.equal(noisy.eval()(images)[0], noisy(images)[0])
