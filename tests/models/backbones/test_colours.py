import pytest
from timm import create_model

from dinoseg.models.backbones.normalisation import resolve_colours
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
        assert tuple(map(list, resolve_colours(source, None, None))) == statistics
    assert ("0.296" in caplog.text and source in caplog.text) == (statistics is SATELLITE)


def test_given_statistics_win_without_a_line(caplog):
    with caplog.at_level("INFO"):
        found = resolve_colours("x/sat493m", (0.1, 0.2, 0.3), (1, 1, 1))
    assert (found, caplog.text) == (((0.1, 0.2, 0.3), (1, 1, 1)), "")


def test_satellite_statistics_equal_timms():
    known = create_model("vit_large_patch16_dinov3.sat493m", pretrained=False, depth=1).pretrained_cfg
    assert (list(known["mean"]), list(known["std"])) == SATELLITE


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
