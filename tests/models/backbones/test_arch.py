"""Values of `backbone.arch` and `layers` that would compute something else are refused by key, value and rule."""

from functools import partial

import pytest
from mistakes import refusals

from dinoseg.models.backbones.convnext import ConvNext
from dinoseg.models.backbones.layers import resolve_layers
from dinoseg.models.backbones.transformers_vit import TransformersVit

SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
STAGES = {"depths": [1, 2, 1, 1], "hidden_sizes": [8, 8, 16, 24]}


def build(family, *, patch_size=8, **arch):
    if family == "convnext":
        return ConvNext(STAGES | arch, "random", 32)
    return TransformersVit(family, SMALL | arch, "random", patch_size)


test_wrong_architectures_are_refused = refusals(
    {
        "heads": (lambda: build("dinov2", num_attention_heads=5), "num_attention_heads=5 ", "size=24", "multiple of 5"),
        "rotated heads": (lambda: build("dinov3_vit", num_attention_heads=12), "=12", "multiple of 48"),
        "depths": (lambda: build("convnext", depths=[1, 1, 1]), "depths=[1, 1, 1]", "hidden_sizes=[8, 8, 16, 24]"),
        "drop path": (lambda: build("dinov2", drop_path_rate=10), "drop_path_rate=10: ", "below 1"),
        "unknown key": (lambda: build("vit", hiden_size=8), "arch: vit has no hiden_size"),
    }
)


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
test_layers_that_do_not_exist_are_refused = refusals(
    {str(layers): (partial(resolve_layers, layers, 3), *OUT_OF_RANGE) for layers in [(3,), (-4,), (), (0, 9)]}
    | {"quarters": (partial(resolve_layers, "quarters", 3), "layers=quarters needs four", "has 3.", "linear or cnn")}
)
