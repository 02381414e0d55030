from functools import partial

import pytest
import torch
from mistakes import refusals
from safetensors.torch import save_file
from timm import create_model
from timm.models import get_pretrained_cfg, list_pretrained

from dinoseg.experiment.builder import Builder
from dinoseg.experiment.recipe import config_description
from dinoseg.models.backbones.normalisation import DEVIATIONS, MEANS, resolve_colours
from dinoseg.models.backbones.rgb import RgbBackbone
from dinoseg.models.backbones.timm_backbone import TimmBackbone
from dinoseg.models.backbones.transformers_vit import TransformersVit

IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
SATELLITE = ([0.430, 0.411, 0.296], [0.213, 0.156, 0.143])
SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.mark.parametrize(
    ("source", "statistics"),
    [
        ("facebook/dinov3-vitl16-pretrain-sat493m", SATELLITE),
        ("facebook/dinov3-vitl16-pretrain-sat493m@main", SATELLITE),
        ("/weights/dinov3_vitl16_pretrain_SAT493M-eadcf0ff.pth", SATELLITE),
        ("/weights/dinov3-vitl16-pretrain-sat493m/model.safetensors", SATELLITE),
        ("/sat493m_study/weights/dinov3_vitl16_pretrain_lvd1689m.pth", IMAGENET),
        ("facebook/dinov3-vitl16-pretrain-lvd1689m", IMAGENET),
        ("random", IMAGENET),
    ],
)
def test_names_of_weights_decide_the_statistics(source, statistics, caplog):
    with caplog.at_level("INFO"):
        given = resolve_colours(source, (0.1, 0.2, 0.3), (1, 1, 1))
        assert (given, caplog.text) == (((0.1, 0.2, 0.3), (1, 1, 1)), "")
        assert tuple(map(list, resolve_colours(source, None, None))) == statistics
    assert ("0.296" in caplog.text and source in caplog.text) == (statistics is SATELLITE)


def test_satellite_statistics_equal_timms():
    known = create_model("vit_large_patch16_dinov3.sat493m", pretrained=False, depth=1).pretrained_cfg
    assert (list(known["mean"]), list(known["std"])) == SATELLITE


PUBLISHED = [  # in 0..1
    IMAGENET,
    SATELLITE,
    ([0.5] * 3, [0.5] * 3),
    ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]),  # CLIP
    ([0.0] * 3, [1.0] * 3),  # models that take 0..1
    ([0.0] * 3, [1 / 255] * 3),  # models that take 0..255
    ([123.675 / 255, 116.28 / 255, 103.53 / 255], [1 / 255] * 3),  # Caffe's: only the mean is subtracted
    ([-0.5] * 3, [2.0] * 3),
]


@pytest.mark.parametrize(("mean", "std"), PUBLISHED)
def test_published_statistics_are_in_range(mean, std):
    model = RgbBackbone(mean=mean, std=std)
    image = torch.rand(1, 3, 16, 16)
    scaled = (image.double() - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert torch.allclose(model.pixels(image).double(), scaled, rtol=1e-4, atol=1e-5)


def test_timms_statistics_are_in_range():
    statistics = {(tuple(cfg.mean), tuple(cfg.std)) for cfg in map(get_pretrained_cfg, list_pretrained())}
    for mean, std in statistics:
        assert all(value in MEANS for value in mean) and all(value in DEVIATIONS for value in std), (mean, std)
    assert len(statistics) > 5


@pytest.mark.slow
def test_backbones_use_the_statistics_of_their_weights(tmp_path):
    build = partial(TransformersVit, "dinov3_vit", SMALL | {"num_register_tokens": 4}, patch_size=16)
    save_file(build(weights="random").export_state(), tmp_path / "sat493m.safetensors")
    model = build(weights=str(tmp_path / "sat493m.safetensors"))
    assert (pytest.approx(model.mean.flatten().tolist()), pytest.approx(model.std.flatten().tolist())) == SATELLITE
    given = build(weights=str(tmp_path / "sat493m.safetensors"), mean=[0.5, 0.5, 0.5])
    assert given.mean.flatten().tolist() == [0.5] * 3
    save_file(TimmBackbone("test_vit", "random", None).export_state(), tmp_path / "vit_sat493m.safetensors")
    timm = TimmBackbone("test_vit", str(tmp_path / "vit_sat493m.safetensors"), None)
    assert pytest.approx(timm.mean.flatten().tolist()) == SATELLITE[0]
    assert TimmBackbone("test_vit", "random", None).mean.flatten().tolist() == [0.5] * 3


@pytest.mark.parametrize(("backbone", "added"), [("rgb", "+"), ("tiny", "")])
def test_published_statistics_pass_the_config(compose, backbone, added):
    words = (f"{added}backbone.mean=[-0.5,0.0,0.5]", f"{added}backbone.std=[2.0,{1 / 255},1.0]")
    build = Builder(compose("mode=train", f"backbone={backbone}", "data.root=x", "data.classes=[a,b]", *words))
    config_description(build)
    assert build.backbone().std.flatten().tolist() == pytest.approx([2.0, 1 / 255, 1.0])


MEAN, STD = "Give a number from -1 to 2 ", "Give a number from 0.001 to 10 "
test_message_names_value_and_remedy = refusals(
    {
        f"{key}={values}": (partial(RgbBackbone, **{key: values}), f"{key}={values}", *words)
        for key, values, *words in (
            ("mean", [], "give 3 numbers"),
            ("mean", [0.5, float("nan"), 0.5], MEAN, "divide statistics of 0..255 by 255", " for each"),
            ("mean", [-1.5, 0, 0], MEAN),
            ("std", [0.2, float("inf"), 0.2], STD, " for each"),
            ("std", [10.5, 1, 1], STD),
        )
    }
)
