"""What the heads that score pixels have in common."""

import inspect

import pytest
import torch
from config_files import read
from hydra.utils import get_object

from dinoseg.core.geometry import valid_share
from dinoseg.models.heads.cnn import CnnHead
from dinoseg.models.heads.dpt import DptHead
from dinoseg.models.heads.linear import LinearHead
from dinoseg.models.heads.mlp import MlpHead
from dinoseg.models.heads.upernet import UperNetHead

HEADS = {
    "linear": lambda dim, layers: LinearHead(dim, layers, 3),
    "mlp": lambda dim, layers: MlpHead(dim, layers, 3, 14),
    "cnn": lambda dim, layers: CnnHead(dim, layers, 3, 14, channels=16),
    "dpt": lambda dim, layers: DptHead(dim, layers, 3, features=4),
    "upernet": lambda dim, layers: UperNetHead(dim, layers, 3, channels=4),
}


@pytest.mark.parametrize("name", HEADS)
def test_scores_are_aligned_with_the_pixels(name):
    """Outputs that say where their cell lies must become scores that say where the pixel lies."""

    def centres(count, length):
        return (torch.arange(count, dtype=torch.float64) + 0.5) * length / count

    image, grid = (123, 90), (9, 7)  # of 14 px
    cells = HEADS[name](6, 4).eval()([torch.randn(1, 6, *grid) for _ in range(4)]).shape[-2:]
    axes = [centres(count, 14 * side) for count, side in zip(cells, grid, strict=True)]
    where = torch.stack(torch.meshgrid(*axes, indexing="ij"))[None]
    scores = HEADS[name](6, 4).predict(where, image, valid_share(image, 14))
    pixels = torch.stack(torch.meshgrid(*(centres(side, side) for side in image), indexing="ij"))
    inside = (slice(None), slice(7, 98), slice(7, 70))  # a cell's half from the border, sampling is constant
    torch.testing.assert_close(scores[0][inside], pixels[inside], atol=1e-4, rtol=0)


# what a config says beside the constructor's defaults; direct: configs from before that key are built without
OTHERS = {"detail": {"linear_skip": True, "channels": "${data.channels}"}}


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("linear", [-1]),
        ("multiscale", [-4, -3, -2, -1]),
        ("mlp", [-1]),
        ("cnn", [-1]),
        ("dpt", "quarters"),
        ("upernet", "quarters"),
        ("detail", "quarters"),
    ],
)
def test_config_names_the_constructor_s_own_defaults(name, layers):
    node = read("head", name)
    assert next(iter(node)) == "layers" and node.pop("layers") == layers and node.pop("lr") > 0
    target = get_object(node.pop("_target_"))
    assert node.pop("_partial_") is True and node.pop("num_classes") == "${data.num_classes}"
    parameters = inspect.signature(target).parameters
    if "patch_size" in parameters:
        assert node.pop("patch_size") == "${backbone.patch_size}"
    defaults = {key: value.default for key, value in parameters.items() if value.default is not value.empty}
    assert node == defaults | OTHERS.get(name, {})


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_heads_of_one_grid_take_one_map_of_a_pyramid(name):
    assert HEADS[name]([8], 1).eval()([torch.randn(1, 8, 2, 3)]).shape == (1, 3, 28, 42)
