"""Parameter counts of the published SAR-RARP50 LoRA recipe (10 classes, DINOv3 ViT, 16 px patches)."""

import pytest
import torch

from dinoseg.experiment.builder import Builder

SIZES = {
    "dinov3_vits16": (14_097_920, {8: 663_552, 16: 1_327_104, 32: 2_654_208}, 589_824),
    "dinov3_vitb16": (15_080_960, {8: 1_327_104, 16: 2_654_208, 32: 5_308_416}, 1_179_648),
    "dinov3_vitl16": (15_736_320, {8: 3_538_944, 16: 7_077_888, 32: 14_155_776}, 3_145_728),
}


def trainable(module):
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


@pytest.fixture
def on_meta(compose):
    def build_model(*overrides):
        with torch.device("meta"):
            return Builder(compose("hparam=sarrarp_lora", "data.root=.", *overrides)).model(untrained=True)

    return build_model


@pytest.mark.parametrize("backbone", SIZES)
def test_head_and_lora_counts(on_meta, backbone):
    head, all_linear, attention = SIZES[backbone]
    ranks = all_linear if backbone == "dinov3_vits16" else {16: all_linear[16]}
    for rank, expected in ranks.items():
        model = on_meta(f"backbone={backbone}", f"adapter.rank={rank}")
        assert (trainable(model.head), trainable(model.backbone)) == (head, expected)
    assert trainable(on_meta(f"backbone={backbone}", "adapter=lora").backbone) == attention


def test_backbone_counts(on_meta):
    counts = {
        name: sum(p.numel() for p in on_meta(f"backbone={name}", "adapter=frozen", "head=linear").backbone.parameters())
        for name in (
            "dinov2_vits14",
            "dinov2_vitg14",
            "dinov3_vits16plus",
            "dinov3_vith16plus",
            "dinov3_vit7b16",
        )
    }
    assert counts == {
        "dinov2_vits14": 22_056_576,
        "dinov2_vitg14": 1_136_480_768,
        "dinov3_vits16plus": 28_692_864,
        "dinov3_vith16plus": 840_592_640,
        "dinov3_vit7b16": 6_716_043_264,
    }


@pytest.mark.parametrize(
    ("backbone", "lora", "linear", "cnn"),
    [
        ("dinov2_vits14", 2_654_208, 1_923, 6_649_347),
        ("dinov2_vitb14", 5_308_416, 3_843, 8_418_819),
        ("dinov2_vitl14", 14_155_776, 5_123, 9_598_467),
    ],
)
def test_counts_of_the_rock_scan_recipes(compose, backbone, lora, linear, cnn):
    for recipe, head in (("schism_linear", linear), ("schism_cnn", cnn)):
        given = [f"hparam={recipe}", f"backbone={backbone}", "data.root=.", "data.classes=[a,b,c]", "engine=cpu"]
        with torch.device("meta"):
            model = Builder(compose(*given)).model(untrained=True)
        assert (trainable(model.backbone), trainable(model.head)) == (lora, head)


def test_counts_of_the_person_recipe(compose):
    with torch.device("meta"):
        model = Builder(compose("hparam=person_multiscale", "data.root=.")).model(untrained=True)
    assert (trainable(model.backbone), trainable(model.head)) == (0, 6_146)


@pytest.mark.parametrize(("recipe", "outputs"), [("idd_m2f", 26), ("idd_m2f_no_object", 27)])
def test_counts_of_the_largest_recipe(compose, recipe, outputs):
    with torch.device("meta"):
        model = Builder(compose(f"hparam={recipe}", "data.root=.")).model(untrained=True)
    classes = 2048 * outputs + outputs
    parts = {"adapter": 227_084_736, "pixel_decoder": 233_719_168, "predictor": 466_307_072 + classes}
    assert {part: sum(p.numel() for p in getattr(model.head, part).parameters()) for part in parts} == parts
    assert trainable(model) == classes
    total = sum(parameter.numel() for parameter in model.parameters())
    assert total == 6_716_043_264 + 927_110_976 + classes
    assert outputs == 27 or (classes, total) == (53_274, 7_643_207_514)
