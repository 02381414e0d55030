"""Backbones of images with other channels than RGB."""

from functools import partial

import pytest
import timm
import torch
from mistakes import assert_refused, refusals
from omegaconf import OmegaConf
from safetensors.torch import save_file
from timm.layers import Conv2dSame, StdConv2d, StdConv2dSame
from timm.models import adapt_input_conv
from tiny_parts import BACKBONES, tiny_node

from dinoseg.config.nodes import instantiate
from dinoseg.models.backbones.patch_projection import (
    InputConvolution,
    PatchProjection,
    adapt_input,
    adapt_input_kernel,
)

SIZE = (70, 45)


def build(name, **options):
    torch.manual_seed(0)
    node = OmegaConf.merge(tiny_node(name), {"layers": [-1]}, options)
    return instantiate(node).eval().requires_grad_(False)


@pytest.mark.parametrize("channels", [1, 2, 4, 13])
def test_kernels_are_those_of_timm(channels):
    kernel = torch.randn(8, 3, 4, 4)
    assert torch.equal(adapt_input_kernel(kernel, channels, None), adapt_input_conv(channels, kernel))


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_weights_scale_the_kernels_of_colours(channels):
    kernel = torch.randn(8, 3, 4, 4, dtype=torch.float64)
    weights = torch.randn(channels, dtype=torch.float64).tolist()
    found = adapt_input_kernel(kernel, channels, weights)
    for channel, weight in enumerate(weights):
        colour = kernel.sum(1) if channels == 1 else kernel[:, channel % 3]
        assert torch.equal(found[:, channel], colour * weight)


@pytest.mark.parametrize("channels", [1, 4])
def test_a_timm_model_is_that_of_timm(channels, tmp_path):
    torch.manual_seed(0)
    path = str(tmp_path / "weights.safetensors")
    save_file(timm.create_model("test_vit", num_classes=0).state_dict(), path)
    ours = build("timm_vit", weights=path, channels=channels)
    overlay = {"pretrained": True, "pretrained_cfg_overlay": {"file": path, "num_classes": 0}, "num_classes": 0}
    theirs = timm.create_model("test_vit", in_chans=channels, dynamic_img_size=True, **overlay).eval()
    images = torch.rand(2, channels, 64, 48)
    wanted = theirs.forward_intermediates(ours.pixels(images), indices=1, norm=True, intermediates_only=True)[-1]
    torch.testing.assert_close(ours(images)[0], wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in BACKBONES if name != "timm_pyramid"])
def test_a_channel_of_weight_zero_changes_no_bit(name):
    three = build(name)
    four = build(name, channels=4, channel_weights=[1, 1, 1, 0])
    images = torch.rand(2, 3, *SIZE)
    for fourth in (torch.zeros(2, 1, *SIZE), torch.rand(2, 1, *SIZE)):
        for wanted, found in zip(three(images), four(torch.cat([images, fourth], 1)), strict=True):
            assert torch.equal(wanted, found)


@pytest.mark.parametrize("convolution", [InputConvolution, PatchProjection])
def test_further_channels_add_to_the_sum(convolution):
    layer = convolution(5, 8, 4, 4).double()
    pixels = torch.randn(2, 5, 16, 12, dtype=torch.float64)
    wanted = torch.nn.functional.conv2d(pixels, layer.weight, layer.bias, 4)
    torch.testing.assert_close(layer(pixels), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", [*BACKBONES, "rgb"])
@pytest.mark.parametrize("channels", [1, 6])
def test_each_family_takes_other_channels(name, channels):
    backbone = build(name, channels=channels)
    assert backbone.channels == channels and backbone.mean.shape == backbone.std.shape == (channels, 1, 1)
    images = torch.rand(1, channels, *SIZE)
    maps = backbone(images)
    assert all(part.isfinite().all() for part in maps)
    changed = images.clone()
    changed[:, -1] = 1 - changed[:, -1]
    assert not torch.equal(backbone(changed)[0], maps[0])


def test_other_channels_have_the_mean_of_colours():
    mean, std = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    four, two = build("rgb", channels=4), build("rgb", channels=2)
    assert four.mean.flatten().tolist() == pytest.approx([*mean, sum(mean) / 3])
    assert two.std.flatten().tolist() == pytest.approx([sum(std) / 3] * 2)


@pytest.mark.parametrize("name", ["dinov2", "dinov3", "convnext", "timm_vit"])
def test_exported_weights_keep_their_channels(name, tmp_path):
    backbone = build(name, channels=4, channel_weights=[1, 2, 3, 4])
    path = str(tmp_path / "backbone.safetensors")
    save_file({key: value.contiguous() for key, value in backbone.export_state().items()}, path)
    again = build(name, channels=4, weights=path)
    images = torch.rand(1, 4, *SIZE)
    assert torch.equal(backbone(images)[0], again(images)[0])
    assert_refused(lambda: build(name, weights=path), "4 channels")


def test_padded_convolutions_of_tensorflow_are_adapted():
    padded = Conv2dSame(3, 8, 3, 2)
    images = torch.rand(1, 4, 9, 9)
    wanted = padded(images[:, :3])
    adapt_input(padded, 4, [1, 1, 1, 0])
    torch.testing.assert_close(padded(images), wanted)


test_message_names_value_and_remedy = refusals(
    {
        str(options): (partial(build, "dinov3", **options), *words)
        for options, *words in (
            ({"channels": 4, "channel_weights": [1, 1, 1]}, "3 numbers, and channels=4"),
            ({"channels": 4, "mean": [0.5] * 3}, "give 4 numbers"),
            ({"channels": 10**9}, "channels=1000000000 ", "from 1 to 1024"),
            ({"channels": 2, "channel_weights": [1, 99]}, "99"),
        )
    }
    | {
        kind.__name__: (lambda kind=kind: adapt_input(kind(3, 8, 4), 4, [1, 1, 1, 0]), f"{kind.__name__}, standardises")
        for kind in (StdConv2d, StdConv2dSame)
    }
)
