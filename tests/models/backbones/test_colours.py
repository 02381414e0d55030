import pytest
import torch
from timm import create_model
from timm.models import get_pretrained_cfg, list_pretrained

from dinoseg.experiment.builder import Builder
from dinoseg.experiment.recipe import config_description
from dinoseg.models.backbones.normalisation import resolve_colours
from dinoseg.models.backbones.timm_backbone import TimmBackbone
from dinoseg.models.backbones.transformers_vit import TransformersVit
from dinoseg.utils.ranges import DEVIATIONS, MEANS

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
        assert tuple(map(list, resolve_colours(source, None, None))) == statistics
    assert ("0.296" in caplog.text and source in caplog.text) == (statistics is SATELLITE)


def test_given_statistics_win_without_a_line(caplog):
    with caplog.at_level("INFO"):
        found = resolve_colours("x/sat493m", (0.1, 0.2, 0.3), (1, 1, 1))
    assert (found, caplog.text) == (((0.1, 0.2, 0.3), (1, 1, 1)), "")


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
@pytest.mark.parametrize("backbone", ["rgb", "tiny"])
def test_published_statistics_are_in_range(compose, backbone, mean, std):
    added = ("+",) * 2 if backbone == "rgb" else ("",) * 2
    words = (f"{added[0]}backbone.mean={mean}", f"{added[1]}backbone.std={std}")
    cfg = compose("mode=train", f"backbone={backbone}", "data.root=x", "data.classes=[a,b]", *words)
    config_description(Builder(cfg))
    model = Builder(cfg).backbone()
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
    from safetensors.torch import save_file

    arch = {**SMALL, "num_register_tokens": 4}
    save_file(TransformersVit("dinov3_vit", arch, "random", 16).export_state(), tmp_path / "sat493m.safetensors")
    model = TransformersVit("dinov3_vit", arch, str(tmp_path / "sat493m.safetensors"), 16)
    assert (pytest.approx(model.mean.flatten().tolist()), pytest.approx(model.std.flatten().tolist())) == SATELLITE
    given = TransformersVit("dinov3_vit", arch, str(tmp_path / "sat493m.safetensors"), 16, mean=[0.5, 0.5, 0.5])
    assert given.mean.flatten().tolist() == [0.5] * 3
    name = "vit_tiny_patch16_224"
    save_file(TimmBackbone(name, "random", None).export_state(), tmp_path / "vit_sat493m.safetensors")
    timm = TimmBackbone(name, str(tmp_path / "vit_sat493m.safetensors"), None)
    assert pytest.approx(timm.mean.flatten().tolist()) == SATELLITE[0]
    assert TimmBackbone(name, "random", None).mean.flatten().tolist() == [0.5] * 3
