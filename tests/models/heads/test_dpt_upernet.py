from functools import partial

import pytest
import torch
from counts import count
from torch import nn

from dinoseg.models.heads.dpt import DptHead
from dinoseg.models.heads.upernet import UperNetHead

FOUR_LEVELS = {
    "dpt": partial(DptHead, features=6),
    "dpt without batch norm": partial(DptHead, features=6, batch_norm=False),
    "upernet": partial(UperNetHead, channels=6),
}


def build(name, in_dim=12, **options):
    torch.manual_seed(2)
    return FOUR_LEVELS[name](in_dim, 4, 3, **options)


@pytest.mark.parametrize("batch_norm", [True, False])
@pytest.mark.parametrize(("dim", "channels"), [(384, [48, 96, 192, 384]), (768, [96, 192, 384, 768])])
def test_parameter_count_is_that_of_another_implementation(dim, channels, batch_norm):
    from transformers import DPTConfig
    from transformers.models.dpt.modeling_dpt import DPTNeck, DPTSemanticSegmentationHead

    config = DPTConfig(
        hidden_size=dim,
        neck_hidden_sizes=channels,
        fusion_hidden_size=256,
        readout_type="ignore",
        use_batch_norm_in_fusion_residual=batch_norm,
    )
    config.num_labels = 7
    with torch.device("meta"):
        neck = DPTNeck(config)
        classify = DPTSemanticSegmentationHead(config)
        own = DptHead(dim, 4, 7, batch_norm=batch_norm)
    # Theirs never reads the first unit of the coarsest fusion, and normalises before the classes always
    unread = count(neck.fusion_stage.layers[0].residual_layer1)
    norm_of_classes = 0 if batch_norm else 2 * 256 - 256
    assert count(own) == count(neck) + count(classify) - unread - norm_of_classes


@pytest.mark.parametrize(
    ("dim", "options", "expected"),
    [
        (384, {}, [48, 96, 192, 384]),
        (1024, {}, [128, 256, 512, 1024]),
        (4096, {}, [128, 256, 512, 1024]),
        (5, {}, [1, 1, 2, 5]),
        ([192, 384, 768, 1536], {}, [192, 384, 768, 1024]),
        (768, {"out_channels": [256, 512, 1024, 1024]}, [256, 512, 1024, 1024]),
    ],
)
def test_channels_of_the_levels_follow_the_width(dim, options, expected):
    with torch.device("meta"):
        assert [part.out_channels for part in DptHead(dim, 4, 2, **options).reassemble.project] == expected


@pytest.mark.parametrize("level", [0, 1, 2, 3])
@pytest.mark.parametrize("side", [8, 9])
def test_each_level_is_aligned_with_its_tokens(level, side):
    """A head that only passes on: a ramp over the tokens must be the same ramp in the output, away from the border."""
    head = build("dpt without batch norm", 1, features=1, out_channels=[1, 1, 1, 1]).double().eval()
    for name, parameter in head.named_parameters():
        torch.nn.init.zeros_(parameter)
        if not name.endswith("bias") and ".body." not in name:
            middle = parameter.shape[-1] // 2 if parameter.shape[-1] == 3 else slice(None)
            parameter.data[..., middle, middle] = 1
    ramp = (torch.arange(side, dtype=torch.float64) + 0.5).view(1, 1, side, 1).expand(1, 1, side, side)
    for maps in (ramp, ramp.transpose(-1, -2)):
        features = [maps if number == level else torch.zeros_like(maps) for number in range(4)]
        output = torch.nn.functional.avg_pool2d(head(features)[:, :1], 4)
        torch.testing.assert_close(output[..., 2:-2, 2:-2], maps[..., 2:-2, 2:-2], atol=1e-9, rtol=0)


def test_dropout_only_in_training():
    maps = [torch.randn(2, 12, 4, 4)] * 4
    head = build("dpt")
    assert torch.equal(head.eval()(maps), head(maps)) and not torch.equal(head.train()(maps), head(maps))
    steady = build("dpt", dropout=0.0).train()
    assert torch.equal(steady(maps), steady(maps))


@pytest.mark.parametrize("in_dim", [384, [96, 192, 384, 768]])
def test_parameters_of_upernet_equal_the_formula(in_dim):
    with torch.device("meta"):
        head = UperNetHead(in_dim, 4, 150)
    dims = [512] * 4 if isinstance(in_dim, int) else in_dim
    pooled = 4 * (dims[-1] * 512 + 2 * 512) + 9 * (dims[-1] + 4 * 512) * 512 + 2 * 512
    pyramid = sum(dim * 512 + 2 * 512 for dim in dims[:3]) + 3 * (9 * 512**2 + 2 * 512)
    classes = 9 * 4 * 512 * 512 + 2 * 512 + 512 * 150 + 150
    made = 4 * (384 * 512 + 512) + (16 + 4 + 9) * 512**2 + 3 * 512 if isinstance(in_dim, int) else 0
    assert count(head) == pooled + pyramid + classes + made


def test_upernet_uses_a_pyramid_unchanged():
    head = build("upernet", [3, 4, 5, 6]).eval()
    maps = [torch.randn(2, 3 + level, *(side * 2 ** (3 - level) for side in (3, 1))) for level in range(4)]
    assert torch.equal(head(maps), head.decoder(maps)) and not list(head.reassemble.parameters())


def test_upernet_trains_on_its_smallest_batch():
    maps = [torch.randn(1, 12, 4, 4)] * 4
    head = build("upernet")
    assert head.eval()(maps).shape == (1, 3, 16, 16)
    more = [part.expand(head.min_batch_size, -1, -1, -1) for part in maps]
    assert torch.equal(head.train()(more), head(more))


@pytest.mark.parametrize("name", FOUR_LEVELS)
@pytest.mark.parametrize("grid", [(1, 1), (1, 4), (5, 3)])
def test_output_covers_the_grid_at_a_quarter_of_a_patch(name, grid):
    head = build(name).eval()
    assert head([torch.randn(2, 12, *grid)] * 4).shape == (2, 3, 4 * grid[0], 4 * grid[1])


@pytest.mark.parametrize("name", FOUR_LEVELS)
def test_a_mirrored_map_gives_a_mirrored_output(name):
    """If every kernel is its own mirror image."""
    head = build(name).double().eval()
    for part in head.modules():
        if isinstance(part, nn.Conv2d | nn.ConvTranspose2d):
            weight = (part.weight.detach() + part.weight.detach().flip(-1)) / 2
            part.weight = nn.Parameter((weight + weight.flip(-2)) / 2)
    for grid in ((1, 1), (2, 3), (3, 2), (5, 5), (6, 7), (9, 1)):
        maps = [torch.randn(1, 12, *grid, dtype=torch.float64) for _ in range(4)]
        output = head(maps)
        assert output.std() > 1e-3 or grid == (1, 1)
        for axis in (-1, -2):
            mirrored = head([part.flip(axis) for part in maps])
            torch.testing.assert_close(mirrored.flip(axis), output, atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", FOUR_LEVELS)
def test_a_pyramid_is_scored_on_its_finest_grid(name):
    head = build(name, [3, 4, 5, 6]).eval()
    for grids in ([(24, 8), (12, 4), (6, 2), (3, 1)], [(9, 7), (5, 4), (3, 2), (2, 1)]):
        maps = [torch.randn(2, 3 + level, *grid) for level, grid in enumerate(grids)]
        assert head(maps).shape == (2, 3, *grids[0])
