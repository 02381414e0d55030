"""What a user can mistype under `backbone.arch` and `layers` is refused by key, value and rule."""

import re
from functools import partial

import pytest
from mistakes import assert_refused, refusals

from dinoseg.models.backbones.arch import configuration
from dinoseg.models.backbones.convnext import ConvNext
from dinoseg.models.backbones.layers import resolve_layers
from dinoseg.models.backbones.transformers_vit import TransformersVit
from dinoseg.utils.errors import UserError

SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
STAGES = {"depths": [1, 2, 1, 1], "hidden_sizes": [8, 8, 16, 24]}


def build(family, *, patch_size=8, **arch):
    if family == "convnext":
        return ConvNext(STAGES | arch, "random", 32)
    return TransformersVit(family, SMALL | arch, "random", patch_size)


@pytest.mark.parametrize(
    ("family", "key", "value", "rule"),
    [
        ("vit", "num_attention_heads", 5, "hidden_size=24: the width must be a multiple of"),
        ("dinov2", "num_attention_heads", 0, "is too small. Give at least 1"),
        ("dinov3_vit", "num_attention_heads", 12, "hidden_size=24: .*a multiple of 48"),  # rotated by four channels
        ("dinov2_with_registers", "hidden_act", "gelo", "is unknown. Choose one of .*gelu"),
        ("dinov2_with_registers", "num_hidden_layers", 0, "is too small. Give at least 1"),
        ("vit", "intermediate_size", 0, "is too small. Give at least 1"),
        ("dinov2", "mlp_ratio", 0, "is too small. Give at least 1"),
        ("dinov2", "layer_norm_eps", "tiny", "expected float, got str"),
        ("dinov3_vit", "initializer_range", -0.1, "is too small. Give at least 0"),
        ("dinov2_with_registers", "num_channels", 4, "images are RGB"),
        ("dinov2_with_registers", "num_register_tokens", -1, "is too small. Give at least 0"),
        ("vit", "hidden_dropout_prob", 3, "is not a probability"),
        ("dinov3_vit", "attention_dropout", 1.0, "is not a probability"),
        ("vit", "image_size", 7, "Give at least patch_size=8"),
        ("convnext", "depths", [1, 1, 1], r"has 3 numbers, arch\.hidden_sizes=\[8, 8, 16, 24\] has 4"),
        ("convnext", "depths", [1, -1, 1, 1], "is too small. Give at least 1"),
        ("convnext", "depths", 3, "expected a list, got int"),
        ("convnext", "hidden_sizes", [8, 8, 8, 0], "is too small. Give at least 1"),
        ("convnext", "drop_path_rate", -0.1, "is not a probability"),
    ],
)
def test_wrong_values_are_refused(family, key, value, rule):
    with pytest.raises(UserError, match=rf"^arch\.{key}={re.escape(str(value))}(?!\w).*{rule}.*\.$"):
        build(family, **{key: value})


def test_other_refusals_name_the_value():
    assert_refused(
        lambda: configuration("dinov2", {"out_indices": [99]}), "arch={'out_indices': [99]}: ", "Correct the"
    )
    message = assert_refused(lambda: build("dinov2", hidden_size=[0] * 4000), "...: ", "expected int, got list")
    assert message.startswith("arch.hidden_size=[0, 0, ") and len(message) < 400


@pytest.mark.parametrize(
    ("depth", "blocks"),
    [
        (4, [0, 1, 2, 3]),
        (5, [1, 2, 3, 4]),
        (6, [1, 2, 4, 5]),
        (12, [2, 5, 8, 11]),
        (24, [4, 11, 17, 23]),
        (40, [9, 19, 29, 39]),
    ],
)
def test_quarters_end_at_the_last_block(depth, blocks):
    assert resolve_layers("quarters", depth) == blocks
    resolve_layers("quarters", depth).append(0)  # lists of their own
    assert resolve_layers("quarters", depth) == blocks


def test_numbers_keep_their_order_and_may_count_from_the_last():
    assert resolve_layers([-1, 0, -12, 3, 3], 12) == [11, 0, 0, 3, 3]
    assert resolve_layers((0,), 1) == [0]


OUT_OF_RANGE = ("layers=[", "this backbone has 3 blocks", "from -3 to 2")
NO_INTEGER = ("layers=[", "]: block numbers are integers", "such as [-1]")
test_layers_that_do_not_exist_are_refused = refusals(
    {str(layers): (partial(resolve_layers, layers, 3), *OUT_OF_RANGE) for layers in [(3,), (-4,), (), (0, 9)]}
    | {str(layers): (partial(resolve_layers, layers, 3), *NO_INTEGER) for layers in [["a"], [1.5], [0, "-1"]]}
    | {str(layers): (partial(resolve_layers, layers, 3), *NO_INTEGER) for layers in [[True], [None], (-1, 1.0)]}
    | {
        "thirds": (partial(resolve_layers, "thirds", 12), "layers=thirds: give a list", "quarters"),
        "quarters": (partial(resolve_layers, "quarters", 3), "layers=quarters needs four", "has 3.", "linear or cnn"),
    }
)
