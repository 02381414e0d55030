import pytest
import torch
from config_files import read
from mirrored import count

from dinoseg.config.nodes import instantiate
from dinoseg.models.heads.linear import LinearHead


def multiscale_head(in_dim, num_layers, num_classes):
    return LinearHead(in_dim, num_layers, num_classes)


def test_parameter_count_of_the_original():
    assert count(multiscale_head(384, 4, 2)) == 6_146 == 2 * 1536 + 2 * 1536 + 2


@pytest.mark.parametrize("in_dim", [5, [3, 4, 8]])
def test_head_is_a_linear_head_over_all_maps(in_dim):
    torch.manual_seed(0)
    head = multiscale_head(in_dim, 3, 2).eval()
    grids = [(5, 3)] * 3 if in_dim == 5 else [(20, 12), (10, 6), (5, 3)]
    dims = [in_dim] * 3 if in_dim == 5 else in_dim
    maps = [torch.randn(2, dim, *grid) for dim, grid in zip(dims, grids, strict=True)]
    head.norm.running_mean.normal_()
    output = head(maps)
    assert output.shape == (2, 2, *grids[0])
    changed = [head([*maps[:level], maps[level] + 1, *maps[level + 1 :]]) for level in range(3)]
    assert all(not torch.allclose(output, other) for other in changed)
    wide = torch.cat([torch.nn.functional.interpolate(part, grids[0], mode="bilinear") for part in maps], 1).double()
    normed = (wide - head.norm.running_mean.view(1, -1, 1, 1)) / (1 + 1e-5) ** 0.5
    weight = head.classify.weight[:, :, 0, 0].double()
    expected = torch.einsum("kc,bcyx->bkyx", weight, normed) + head.classify.bias.view(1, -1, 1, 1)
    torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=1e-5)


def test_the_config_draws_one_convolution_from_all_maps():
    config = {key: value for key, value in read("head", "multiscale").items() if key not in ("layers", "lr")}
    torch.manual_seed(3)
    head = instantiate(config | {"num_classes": 2})(in_dim=5, num_layers=2).state_dict()
    torch.manual_seed(3)
    expected = torch.nn.Conv2d(10, 2, 1).state_dict()
    assert all(torch.equal(value, head[f"classify.{name}"]) for name, value in expected.items())


def test_the_last_four_blocks_are_read_by_default():
    assert read("head", "multiscale")["layers"] == [-4, -3, -2, -1]
