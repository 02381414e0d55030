"""What the heads that score pixels have in common."""

import inspect
import math

import pytest
import torch
from config_files import read
from hydra.utils import get_object
from mirrored import count

from dinoseg.core.geometry import valid_share
from dinoseg.models.heads.cnn import CnnHead
from dinoseg.models.heads.dpt import DptHead
from dinoseg.models.heads.linear import LinearHead
from dinoseg.models.heads.mlp import MlpHead
from dinoseg.models.heads.upernet import UperNetHead
from dinoseg.utils.errors import UserError

HEADS = {
    "linear": lambda dim, layers: LinearHead(dim, layers, 3),
    "multiscale": lambda dim, layers: LinearHead(dim, layers, 3),
    "mlp": lambda dim, layers: MlpHead(dim, layers, 3, 14),
    "cnn": lambda dim, layers: CnnHead(dim, layers, 3, 14, channels=16),
    "dpt": lambda dim, layers: DptHead(dim, layers, 3, features=4),
    "upernet": lambda dim, layers: UperNetHead(dim, layers, 3, channels=4),
}


@pytest.mark.parametrize(
    ("dim", "num_layers", "expected"), [(384, 1, 1_923), (768, 1, 3_843), (1024, 1, 5_123), (768, 4, 15_363)]
)
def test_linear_parameter_counts_of_the_original(dim, num_layers, expected):
    assert count(LinearHead(dim, num_layers, 3)) == expected


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("image", [(123, 90), (112, 141)])
def test_scores_are_aligned_with_the_pixels(name, image):
    """Outputs that say where their cell lies must become scores that say where the pixel lies."""
    head = HEADS[name](6, 4).eval()
    grid = [math.ceil(side / 14) for side in image]
    output = head([torch.randn(1, 6, *grid) for _ in range(4)])
    cells = output.shape[-2:]
    rows = (torch.arange(cells[0], dtype=torch.float64) + 0.5) * grid[0] * 14 / cells[0]
    columns = (torch.arange(cells[1], dtype=torch.float64) + 0.5) * grid[1] * 14 / cells[1]
    where = torch.stack(torch.meshgrid(rows, columns, indexing="ij"))[None]
    scores = head.predict(where, image, valid_share(image, 14))
    pixels = torch.stack(
        torch.meshgrid(*(torch.arange(side, dtype=torch.float64) + 0.5 for side in image), indexing="ij")
    )
    inside = (slice(None), slice(7, 98), slice(7, 70))  # a cell's half from the border, sampling is constant
    torch.testing.assert_close(scores[0][inside], pixels[inside], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_a_pyramid_is_refused_by_heads_of_one_grid(name):
    message = rf"head {name} .*gets 2 maps of a pyramid.*layers=\[-1\].*dpt or upernet"
    with pytest.raises(UserError, match=message):
        HEADS[name]([4, 8], 2)
    head = HEADS[name]([8], 1).eval()
    assert head([torch.randn(1, 8, 2, 3)]).shape == (1, 3, 28, 42)


@pytest.mark.parametrize("name", ["dpt", "upernet"])
@pytest.mark.parametrize(("dim", "num_layers"), [(6, 1), (6, 5), ([4, 8], 2)])
def test_heads_of_four_levels_refuse_another_number(name, dim, num_layers):
    message = f"head {name} reads four feature maps, but num_layers={num_layers}. .*quarters.*linear, mlp or cnn"
    with pytest.raises(UserError, match=message):
        HEADS[name](dim, num_layers)


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
