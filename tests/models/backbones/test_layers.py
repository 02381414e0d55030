import pytest

from dinoseg.models.backbones.layers import resolve_layers
from dinoseg.utils.errors import UserError


@pytest.mark.parametrize(
    ("depth", "blocks"),
    [
        (4, [0, 1, 2, 3]),
        (5, [1, 2, 3, 4]),
        (6, [1, 2, 4, 5]),
        (12, [2, 5, 8, 11]),
        (24, [4, 11, 17, 23]),
        (32, [7, 15, 23, 31]),
        (40, [9, 19, 29, 39]),
    ],
)
def test_quarters_end_at_the_last_block(depth, blocks):
    assert resolve_layers("quarters", depth) == blocks


def test_resolved_layers_can_be_modified_safely():
    resolve_layers("quarters", 24).append(0)
    assert resolve_layers("quarters", 24) == [4, 11, 17, 23]


def test_numbers_keep_their_order_and_may_count_from_the_last():
    assert resolve_layers([-1, 0, -12, 3, 3], 12) == [11, 0, 0, 3, 3]
    assert resolve_layers((0,), 1) == [0]


@pytest.mark.parametrize("layers", [(3,), (-4,), (), (0, 9)])
def test_numbers_out_of_range_are_refused_with_the_range(layers):
    with pytest.raises(UserError, match=r"layers=\[.*this backbone has 3 blocks.*from -3 to 2"):
        resolve_layers(layers, 3)


def test_unknown_words_and_too_few_blocks_are_refused():
    with pytest.raises(UserError, match=r"layers=thirds: give a list.*quarters"):
        resolve_layers("thirds", 12)
    with pytest.raises(UserError, match=r"layers=quarters needs four blocks.* has 3\..*linear or cnn"):
        resolve_layers("quarters", 3)


@pytest.mark.parametrize("layers", [["a"], [1.5], [0, "-1"], [True], [None], (-1, 1.0)])
def test_non_integer_layers_are_refused(layers):
    with pytest.raises(UserError, match=r"layers=\[.*\]: block numbers are integers.*such as \[-1\]"):
        resolve_layers(layers, 3)
