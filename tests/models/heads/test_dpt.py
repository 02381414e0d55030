import pytest
import torch
from mirrored import check_mirrored, count, mirror_weights

from dinoseg.models.heads.dpt import DptHead
from dinoseg.utils.errors import UserError


def small(in_dim=12, **options):
    torch.manual_seed(2)
    return DptHead(in_dim, 4, 3, **{"features": 6, **options})


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
        neck, classify = DPTNeck(config), DPTSemanticSegmentationHead(config)
        own = DptHead(dim, 4, 7, batch_norm=batch_norm)
    # Theirs never reads the first unit of the coarsest fusion, and normalises before the classes always
    unread = count(neck.fusion_stage.layers[0].residual_layer1)
    norm_of_classes = 0 if batch_norm else 2 * 256 - 256
    assert count(own) == count(neck) + count(classify) - unread - norm_of_classes


@pytest.mark.parametrize(
    ("dim", "expected"),
    [(384, [48, 96, 192, 384]), (1024, [128, 256, 512, 1024]), (4096, [128, 256, 512, 1024]), (5, [1, 1, 2, 5])],
)
def test_channels_of_the_levels_follow_the_width(dim, expected):
    with torch.device("meta"):
        assert [part.out_channels for part in DptHead(dim, 4, 2).reassemble.project] == expected


def test_channels_of_a_pyramid_are_its_own():
    with torch.device("meta"):
        project = DptHead([192, 384, 768, 1536], 4, 2).reassemble.project
        given = DptHead(768, 4, 2, out_channels=[256, 512, 1024, 1024]).reassemble.project
    assert [part.out_channels for part in project] == [192, 384, 768, 1024]
    assert [part.out_channels for part in given] == [256, 512, 1024, 1024]


@pytest.mark.parametrize("grid", [(1, 1), (1, 4), (2, 2), (5, 3), (7, 8)])
@pytest.mark.parametrize("batch_norm", [True, False])
def test_output_covers_the_grid_at_a_quarter_of_a_patch(grid, batch_norm):
    head = small(batch_norm=batch_norm).eval()
    assert head([torch.randn(2, 12, *grid)] * 4).shape == (2, 3, 4 * grid[0], 4 * grid[1])


GRIDS = [(1, 1), (2, 3), (3, 2), (4, 4), (5, 5), (6, 7), (9, 1)]


@pytest.mark.parametrize("batch_norm", [True, False])
def test_a_mirrored_map_gives_a_mirrored_output(batch_norm):
    check_mirrored(mirror_weights(small(batch_norm=batch_norm)), GRIDS, [12] * 4)


@pytest.mark.parametrize("level", [0, 1, 2, 3])
@pytest.mark.parametrize("side", [8, 9])
def test_each_level_is_aligned_with_its_tokens(level, side):
    """A head that only passes on: a ramp over the tokens must be the same ramp in the output, away from the border."""
    head = small(1, features=1, out_channels=[1, 1, 1, 1], batch_norm=False).double().eval()
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


def test_a_pyramid_is_scored_on_its_finest_grid():
    head = small([3, 4, 5, 6]).eval()
    maps = [torch.randn(2, 3 + level, *(side * 2 ** (3 - level) for side in (3, 1))) for level in range(4)]
    assert head(maps).shape == (2, 3, 24, 8)
    uneven = [torch.randn(2, 3 + level, *grid) for level, grid in enumerate([(9, 7), (5, 4), (3, 2), (2, 1)])]
    assert head(uneven).shape == (2, 3, 9, 7)


def test_dropout_only_in_training():
    maps = [torch.randn(2, 12, 4, 4)] * 4
    head = small()
    assert torch.equal(head.eval()(maps), head(maps)) and not torch.equal(head.train()(maps), head(maps))
    steady = small(dropout=0.0).train()
    assert torch.equal(steady(maps), steady(maps))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"features": 0}, "features=0 .*at least 1"),
        ({"out_channels": [8, 8, 8]}, r"out_channels=\[8, 8, 8\]: give four whole numbers of at least 1"),
        ({"out_channels": ["a", 1, 1, 1]}, r"out_channels=\['a', 1, 1, 1\] .*list of whole numbers"),
        ({"out_channels": [8, 8, 8.5, 8]}, r"out_channels=\[8, 8, 8.5, 8\] .*list of whole numbers"),
        ({"out_channels": [8, 8, [8], None]}, r"out_channels=\[8, 8, \[8\], None\] .*list of whole numbers"),
        ({"out_channels": []}, r"out_channels=\[\]: give four whole numbers"),
        ({"out_channels": [8, 8, 8, 0]}, r"out_channels=\[8, 8, 8, 0\] .*at least 1.*None"),
        ({"dropout": 1.5}, "dropout=1.5 .*below 1"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        small(**options)
