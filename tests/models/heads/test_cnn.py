import math

import pytest
import torch
import torch.nn.functional as F
from bicubic import cubic_matrix

from dinoseg.models.heads.cnn import CnnHead


def small(patch_size=14, num_layers=1, **options):
    torch.manual_seed(1)
    return CnnHead(5, num_layers, 3, patch_size, **{"channels": 32, **options})


@pytest.mark.parametrize("patch_size", range(1, 19))
def test_output_has_the_pixels_of_the_padded_image(patch_size):
    for blocks in range(1, min(5, patch_size.bit_length()) + 1):
        head = CnnHead(2, 1, 2, patch_size, blocks, 16, pixel_shuffle=min(2, blocks - 1)).eval()
        for grid in ((1, 1), (2, 3), (5, 4)):
            output = head([torch.randn(1, 2, *grid)])
            assert output.shape[-2:] == (grid[0] * patch_size, grid[1] * patch_size), (blocks, grid)


def enlarge(grid, scale):
    rows, columns = grid.shape[-2:]
    if scale == 1:
        return grid
    down = cubic_matrix(rows, scale, math.ceil(rows * scale))
    along = cubic_matrix(columns, scale, math.ceil(columns * scale))
    return torch.einsum("yr,bcrs,xs->bcyx", down, grid, along)


def shuffle(grid):
    """Spread each four channels over squares of 2 x 2 cells, row by row."""
    batch, channels, rows, columns = grid.shape
    result = torch.zeros(batch, channels // 4, rows * 2, columns * 2, dtype=torch.float64)
    for channel in range(channels):
        target, place = divmod(channel, 4)
        result[:, target, place // 2 :: 2, place % 2 :: 2] = grid[:, channel]
    return result


ACTIVATIONS = {
    "relu": lambda x: x.where(x > 0, 0),
    "leakyrelu": lambda x: x.where(x > 0, 0.01 * x),
    "sigmoid": lambda x: 1 / (1 + (-x).exp()),
    "tanh": lambda x: (x.exp() - (-x).exp()) / (x.exp() + (-x).exp()),
}


def reference(state, maps, patch_size, num_blocks, pixel_shuffle, activation):
    """Return the forward pass in float64, from the description of the original."""

    def convolve(grid, name):
        weight = state[f"{name}.weight"]
        return F.conv2d(grid, weight, state[f"{name}.bias"], padding=weight.shape[-1] // 2)

    grid = convolve(torch.cat(maps, 1), "enter")
    for number in range(1, num_blocks + 1):
        if number == 1:
            grid = enlarge(grid, patch_size / 2 ** (num_blocks - 1))
        else:
            grid = shuffle(grid) if number > num_blocks - pixel_shuffle else enlarge(grid, 2)
        block = f"blocks.{number - 1}"
        if number <= num_blocks - pixel_shuffle:
            mean, variance, scale, shift = (
                state[f"{block}.0.{name}"].view(1, -1, 1, 1)
                for name in ("running_mean", "running_var", "weight", "bias")
            )
            normed = (grid - mean) / (variance + 1e-5).sqrt() * scale + shift
            grid = grid + convolve(normed, f"{block}.1")
        else:
            grid = grid + convolve(grid, block)
        if number in range(num_blocks, 0, -2):
            grid = ACTIVATIONS[activation](grid)
    rows, columns = (side * patch_size for side in maps[0].shape[-2:])
    return convolve(grid, "classify")[..., :rows, :columns]


@pytest.mark.parametrize(
    ("patch_size", "grid", "num_layers", "options"),
    [
        (14, (4, 8), 1, {}),  # as the original: a whole number of cells
        (14, (5, 3), 2, {}),
        (14, (1, 7), 1, {"activation": "tanh"}),
        (16, (3, 2), 3, {"activation": "leakyrelu"}),
        (8, (3, 4), 1, {"activation": "sigmoid", "kernel_size": 5}),
        (14, (3, 5), 1, {"num_blocks": 3, "pixel_shuffle": 0, "kernel_size": 1}),
        (16, (2, 3), 1, {"num_blocks": 5, "pixel_shuffle": 1, "kernel_size": 7, "channels": 4}),
        (7, (4, 3), 1, {"num_blocks": 2, "pixel_shuffle": 1}),
        (10, (2, 3), 1, {"num_blocks": 1, "pixel_shuffle": 0}),
    ],
)
def test_forward_equals_the_documented_reference(patch_size, grid, num_layers, options):
    head = small(patch_size, num_layers, **options).double().eval()
    for part in head.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            for values in (part.weight, part.bias, part.running_mean):
                torch.nn.init.normal_(values)
            torch.nn.init.uniform_(part.running_var, 0.5, 2)
    maps = [torch.randn(2, 5, *grid, dtype=torch.float64) for _ in range(num_layers)]
    expected = reference(
        head.state_dict(),
        maps,
        patch_size,
        options.get("num_blocks", 4),
        options.get("pixel_shuffle", 2),
        options.get("activation", "relu"),
    )
    with torch.no_grad():
        torch.testing.assert_close(head(maps), expected, atol=1e-9, rtol=1e-9)


def test_dropout_is_silent_at_inference_and_active_in_training():
    maps = [torch.randn(2, 5, 4, 4)]
    shares = []
    head = small(dropout=0.2)
    head.dropout.register_forward_hook(lambda module, given, result: shares.append((result == 0).float().mean().item()))
    assert not torch.equal(head.train()(maps), head(maps))
    assert len(shares) == 4 and all(share == pytest.approx(0.2, abs=0.05) for share in shares)
    assert torch.equal(head.eval()(maps), head(maps))
    assert max(shares[4:]) < 0.01
    steady = small(dropout=0.0).train()
    assert torch.equal(steady(maps), steady(maps))
