import pytest
import torch
from mirrored import check_mirrored, count, mirror_weights

from dinoseg.models.heads.upernet import UperNetHead
from dinoseg.utils.errors import UserError


def small(in_dim=12, **options):
    torch.manual_seed(3)
    return UperNetHead(in_dim, 4, 3, **{"channels": 6, **options})


@pytest.mark.parametrize("in_dim", [384, [96, 192, 384, 768]])
def test_parameter_count_equals_the_formula(in_dim):
    with torch.device("meta"):
        head = UperNetHead(in_dim, 4, 150)
    dims = [512] * 4 if isinstance(in_dim, int) else in_dim
    pooled = 4 * (dims[-1] * 512 + 2 * 512) + 9 * (dims[-1] + 4 * 512) * 512 + 2 * 512
    pyramid = sum(dim * 512 + 2 * 512 for dim in dims[:3]) + 3 * (9 * 512**2 + 2 * 512)
    classes = 9 * 4 * 512 * 512 + 2 * 512 + 512 * 150 + 150
    made = 4 * (384 * 512 + 512) + (16 + 4 + 9) * 512**2 + 3 * 512 if isinstance(in_dim, int) else 0
    assert count(head) == pooled + pyramid + classes + made


@pytest.mark.parametrize("grid", [(1, 1), (1, 4), (5, 3), (8, 7)])
def test_output_covers_the_grid_at_a_quarter_of_a_patch(grid):
    assert small().eval()([torch.randn(2, 12, *grid)] * 4).shape == (2, 3, 4 * grid[0], 4 * grid[1])


def test_a_mirrored_map_gives_a_mirrored_output():
    check_mirrored(mirror_weights(small()), [(1, 1), (2, 3), (3, 2), (4, 4), (5, 5), (9, 1)], [12] * 4)


def test_pyramid_is_used_unchanged():
    head = small([3, 4, 5, 6]).eval()
    maps = [torch.randn(2, 3 + level, *(side * 2 ** (3 - level) for side in (3, 1))) for level in range(4)]
    assert head(maps).shape == (2, 3, 24, 8)
    assert torch.equal(head(maps), head.decoder(maps)) and not list(head.reassemble.parameters())


def test_two_passes_are_equal():
    maps = [torch.randn(2, 12, 4, 4)] * 4
    for head in (small().eval(), small().train()):
        assert torch.equal(head(maps), head(maps))


def test_single_images_cannot_train_but_can_be_predicted():
    def maps_of(batch):
        return [torch.randn(batch, 12, 4, 4)] * 4

    head, maps = small(), maps_of(1)
    with pytest.raises(UserError, match="cannot train on batches of one image: .*at least 2"):
        head.train()(maps)
    assert head.eval()(maps).shape == (1, 3, 16, 16)
    assert head.train()(maps_of(head.min_batch_size)).shape == (head.min_batch_size, 3, 16, 16)


def test_no_channels_are_refused():
    with pytest.raises(UserError, match="channels=0 .*at least 1"):
        small(channels=0)
