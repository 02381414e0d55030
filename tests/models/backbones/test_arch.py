"""What a user can mistype under `backbone.arch` is refused by key, value and rule."""

import re

import pytest

from dinoseg.models.backbones.arch import configuration
from dinoseg.models.backbones.convnext import ConvNext
from dinoseg.models.backbones.transformers_vit import FAMILIES, TransformersVit
from dinoseg.utils.errors import UserError

SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
STAGES = {"depths": [1, 2, 1, 1], "hidden_sizes": [8, 8, 16, 24]}


def vit(family, **arch):
    return TransformersVit(family, SMALL | arch, "random", 8)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("num_attention_heads", 5, "hidden_size=24: the width must be a multiple of"),
        ("num_attention_heads", 0, "is too small. Give at least 1"),
        ("num_attention_heads", -3, "is too small. Give at least 1"),
        ("hidden_act", "gelo", "is unknown. Choose one of .*gelu"),
        ("hidden_size", "64a", "expected int, got str"),
        ("hidden_size", None, "expected int, got NoneType"),
        ("hidden_size", -24, "is too small. Give at least 1"),
        ("num_hidden_layers", 0, "is too small. Give at least 1"),
        ("num_hidden_layers", 2.5, "expected int, got float"),
        ("layer_norm_eps", "tiny", "expected float, got str"),
        ("initializer_range", -0.1, "is too small. Give at least 0"),
        ("num_channels", 4, "images are RGB"),
    ],
)
def test_wrong_transformer_values_are_refused(family, key, value, rule):
    with pytest.raises(UserError, match=rf"^arch\.{key}={value}\b.*{rule}.*\.$"):
        vit(family, **{key: value})


@pytest.mark.parametrize(
    ("family", "key", "value", "rule"),
    [
        ("vit", "intermediate_size", -1, "is too small. Give at least 1"),
        ("dinov2", "mlp_ratio", 0, "is too small. Give at least 1"),
        ("dinov2_with_registers", "num_register_tokens", -1, "is too small. Give at least 0"),
        ("vit", "hidden_dropout_prob", 3, "is not a probability"),
        ("dinov3_vit", "attention_dropout", 1.0, "is not a probability"),
        ("vit", "image_size", 7, "Give at least patch_size=8"),
        ("dinov2", "image_size", -1, "Give at least patch_size=8"),
    ],
)
def test_wrong_values_of_one_family_are_refused(family, key, value, rule):
    with pytest.raises(UserError, match=rf"^arch\.{key}={value}\b.*{rule}"):
        vit(family, **{key: value})


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("depths", [1, 1, 1], r"has 3 numbers, arch\.hidden_sizes=\[8, 8, 16, 24\] has 4"),
        ("depths", [1, 1, 1, 1, 1], "has 5 numbers"),
        ("depths", [1, -1, 1, 1], "is too small. Give at least 1"),
        ("depths", [1, 1, 1, "a"], "list"),
        ("depths", 3, "expected a list, got int"),
        ("hidden_sizes", [8, 8, 8, 0], "is too small. Give at least 1"),
        ("hidden_act", "gelo", "is unknown. Choose one of .*gelu"),
        ("drop_path_rate", -0.1, "is not a probability"),
    ],
)
def test_wrong_convnext_values_are_refused(key, value, rule):
    with pytest.raises(UserError, match=rf"^arch\.{key}={re.escape(str(value))}.*{rule}"):
        ConvNext(STAGES | {key: value}, "random", 32)


def test_rotated_heads_need_a_multiple_of_four_channels():
    with pytest.raises(UserError, match="num_attention_heads=12 .*hidden_size=24: .*a multiple of 48"):
        vit("dinov3_vit", num_attention_heads=12)
    assert vit("dinov2", num_attention_heads=12).dim == 24
    assert vit("dinov3_vit", num_attention_heads=6).dim == 24


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("patch_size", [0, -8])
def test_a_patch_has_a_size(family, patch_size):
    with pytest.raises(UserError, match=rf"^patch_size={patch_size} is too small. Give at least 1"):
        TransformersVit(family, SMALL, "random", patch_size)


def test_arch_refused_by_transformers_is_refused():
    with pytest.raises(UserError, match=r"^arch=\{'out_indices': \[99\]\}: .*99.*Correct the value"):
        configuration("dinov2", {"out_indices": [99]})


def test_valid_values_reach_the_model():
    config = configuration("dinov3_vit", SMALL | {"patch_size": 8, "hidden_act": "silu", "pos_embed_rescale": None})
    assert (config.hidden_size, config.patch_size, config.hidden_act, config.pos_embed_rescale) == (24, 8, "silu", None)


def test_long_value_is_shortened():
    with pytest.raises(UserError, match=r"^arch\.hidden_size=\[0, 0, .*\.\.\.: .*expected int, got list") as refused:
        vit("dinov2", hidden_size=[0] * 4000)
    assert len(str(refused.value)) < 400
