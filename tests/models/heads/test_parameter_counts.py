"""Parameter counts of published recipes and backbones."""

import pytest
import torch

from dinoseg.experiment.builder import Builder
from dinoseg.training.cost import count_numbers

SARRARP = ("hparam=sarrarp_lora", "data.root=.")  # SAR-RARP50: 10 classes, DINOv3 with patches of 16 px
ROCKS = ("data.root=.", "data.classes=[a,b,c]", "engine=cpu")


@pytest.fixture
def outline(compose):
    """Return a function that composes a config and builds its model without weights or memory."""

    def build(*overrides):
        with torch.device("meta"):
            return Builder(compose(*overrides)).model(untrained=True)

    return build


QUICK = [  # overrides, trained parameters of the backbone and of the head
    ((*SARRARP, "backbone=dinov3_vits16", "adapter.rank=8"), 663_552, 14_097_920),
    ((*SARRARP, "backbone=dinov3_vits16", "adapter=lora"), 589_824, 14_097_920),
    ((*ROCKS, "hparam=schism_linear", "backbone=dinov2_vits14"), 2_654_208, 1_923),
    (("hparam=person_multiscale", "data.root=."), 0, 6_146),
    (("hparam=idd_m2f", "data.root=."), 0, 53_274),
]
HEAVY = [
    ((*SARRARP, "backbone=dinov3_vits16", "adapter.rank=32"), 2_654_208, 14_097_920),
    ((*SARRARP, "backbone=dinov3_vitb16", "adapter.rank=16"), 2_654_208, 15_080_960),
    ((*SARRARP, "backbone=dinov3_vitl16", "adapter.rank=16"), 7_077_888, 15_736_320),
    ((*SARRARP, "backbone=dinov3_vitl16", "adapter=lora"), 3_145_728, 15_736_320),
    ((*ROCKS, "hparam=schism_cnn", "backbone=dinov2_vitb14"), 5_308_416, 8_418_819),
    ((*ROCKS, "hparam=schism_linear", "backbone=dinov2_vitl14"), 14_155_776, 5_123),
    (("hparam=idd_m2f_no_object", "data.root=."), 0, 2048 * 27 + 27),
]


@pytest.mark.parametrize(
    ("overrides", "backbone", "head"), [*QUICK, *(pytest.param(*row, marks=pytest.mark.heavy) for row in HEAVY)]
)
def test_trained_parameters_of_recipes(outline, overrides, backbone, head):
    model = outline(*overrides)
    counts = [count_numbers(part.parameters())["trainable"] for part in (model.backbone, model.head)]
    assert counts == [backbone, head]


@pytest.mark.parametrize(
    ("backbone", "parameters"),
    [
        ("dinov2_vits14", 22_056_576),
        pytest.param("dinov2_vitg14", 1_136_480_768, marks=pytest.mark.heavy),
        pytest.param("dinov3_vits16plus", 28_692_864, marks=pytest.mark.heavy),
        pytest.param("dinov3_vith16plus", 840_592_640, marks=pytest.mark.heavy),
        ("dinov3_vit7b16", 6_716_043_264),
        ("dinov3_convnext_tiny", 27_820_128),
        pytest.param("dinov3_convnext_small", 49_454_688, marks=pytest.mark.heavy),
        pytest.param("dinov3_convnext_base", 87_566_464, marks=pytest.mark.heavy),
        ("dinov3_convnext_large", 196_230_336),
    ],
)
def test_parameters_of_backbones(outline, backbone, parameters):
    model = outline(*SARRARP, f"backbone={backbone}", "adapter=frozen", "head=linear")
    assert count_numbers(model.backbone.parameters())["total"] == parameters
