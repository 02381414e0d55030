"""What the heads that score pixels have in common."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from config_files import read
from hydra.utils import get_object
from torch import nn

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
        *((name, [-1]) for name in ("linear", "mlp", "cnn")),
        ("multiscale", [-4, -3, -2, -1]),
        *((name, "quarters") for name in ("dpt", "upernet", "detail")),
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


@pytest.mark.parametrize(("size", "dropout"), [((3, 5), 0.1), ((1, 4), 0.6), ((7, 7), 0.6)])
def test_channels_are_dropped_before_the_norm(size, dropout):
    torch.manual_seed(0)
    head = LinearHead(16, 1, 4, dropout=dropout, init="normal").double()
    nn.init.normal_(head.norm.weight)
    nn.init.normal_(head.norm.bias)
    features = torch.randn(3, 16, *size, dtype=torch.float64)
    torch.manual_seed(1)
    kept = nn.Dropout2d(dropout)(torch.ones_like(features))
    assert set(kept.flatten().tolist()) == {0, 1 / (1 - dropout)} and (kept == kept[:, :, :1, :1]).all()
    dropped = features * kept
    variance, mean = torch.var_mean(dropped, (0, 2, 3), correction=0, keepdim=True)
    gain, shift = (part.view(1, -1, 1, 1) for part in (head.norm.weight, head.norm.bias))
    normal = (dropped - mean) / (variance + 1e-5).sqrt() * gain + shift
    expected = torch.einsum("kc,bchw->bkhw", head.classify.weight[:, :, 0, 0], normal)
    expected = expected + head.classify.bias.view(1, -1, 1, 1)
    torch.manual_seed(1)
    torch.testing.assert_close(head.train()([features]), expected, rtol=1e-9, atol=1e-12)
    plain = LinearHead(16, 1, 4).double().eval()
    plain.load_state_dict(head.state_dict())
    assert torch.equal(head.eval()([features]), plain([features]))  # evaluation drops nothing


def test_normal_weights():
    torch.manual_seed(0)
    head = LinearHead(384, 2, 150, init="normal")
    weights = head.classify.weight.detach()
    assert head.init is None and not head.classify.bias.any()
    assert weights.std().item() == pytest.approx(0.01, rel=0.02) and abs(weights.mean().item()) < 1e-4
    assert weights.abs().max() > 0.03  # not uniform
    torch.manual_seed(0)
    plain, probe = LinearHead(384, 2, 150), LinearHead(384, 2, 150, init="probe")
    assert plain.classify.bias.any() and plain.init is None and probe.init == "probe"


@pytest.mark.parametrize("in_dim", [5, [3, 4, 8]])
def test_several_maps_are_normed_and_scored_as_one(in_dim):
    torch.manual_seed(0)
    head = LinearHead(in_dim, 3, 2).eval()
    grids = [(5, 3)] * 3 if in_dim == 5 else [(20, 12), (10, 6), (5, 3)]
    dims = [in_dim] * 3 if in_dim == 5 else in_dim
    maps = [torch.randn(2, dim, *grid) for dim, grid in zip(dims, grids, strict=True)]
    head.norm.running_mean.normal_()
    output = head(maps)
    assert output.shape == (2, 2, *grids[0])
    changed = [head([*maps[:level], maps[level] + 1, *maps[level + 1 :]]) for level in range(3)]
    assert all(not torch.allclose(output, other) for other in changed)
    wide = torch.cat([F.interpolate(part, grids[0], mode="bilinear") for part in maps], 1).double()
    normed = (wide - head.norm.running_mean.view(1, -1, 1, 1)) / (1 + 1e-5) ** 0.5
    weight = head.classify.weight[:, :, 0, 0].double()
    expected = torch.einsum("kc,bcyx->bkyx", weight, normed) + head.classify.bias.view(1, -1, 1, 1)
    torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=1e-5)
