import math

import numpy as np
import pytest
import torch

from dinoseg.models.backbones.transformers_vit import METHODS, interpolate


def cubic(x, a):
    x = abs(x)
    if x < 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def plain_row(step, cell, side):
    """Weights of the stored cells: four neighbours, the border repeated."""
    row = np.zeros(side)
    centre = (cell + 0.5) * step - 0.5
    for j in range(math.floor(centre) - 1, math.floor(centre) + 3):
        row[min(max(j, 0), side - 1)] += cubic(centre - j, -0.75)
    return row


def smooth_row(step, cell, side):
    """Weights of the stored cells: a kernel as wide as a wanted cell, renormalised at the border."""
    width = max(step, 1.0)
    centre = (cell + 0.5) * step
    row = np.array([cubic((j + 0.5 - centre) / width, -0.5) for j in range(side)])
    first, last = int(centre - 2 * width + 0.5), int(centre + 2 * width + 0.5)
    row[: max(first, 0)] = 0
    row[last:] = 0
    return row / row.sum()


def by_hand(positions, grid, offset, antialias):
    side = round((positions.shape[1] - 1) ** 0.5)
    stored = positions[0, 1:].double().numpy().reshape(side, side, -1)
    row = smooth_row if antialias else plain_row
    rows, columns = (np.stack([row(side / (n + offset), cell, side) for cell in range(n)]) for n in grid)
    wanted = np.einsum("yr,xc,rck->yxk", rows, columns, stored, optimize=True).reshape(1, grid[0] * grid[1], -1)
    return torch.cat([positions[:, :1].double(), torch.from_numpy(wanted)], dim=1)


@pytest.mark.parametrize("family", METHODS)
@pytest.mark.parametrize("grid", [(1, 1), (2, 9), (4, 6), (13, 3), (7, 1)])
def test_positions_are_those_of_a_plain_loop(family, grid):
    torch.manual_seed(0)
    offset, antialias = METHODS[family]
    positions = torch.randn(1, 26, 3, dtype=torch.float64)
    found = interpolate(positions, grid, offset=offset, antialias=antialias)
    assert found.shape == (1, 1 + grid[0] * grid[1], 3)
    torch.testing.assert_close(found, by_hand(positions, grid, offset, antialias), atol=1e-9, rtol=0)
    assert interpolate(positions, (5, 5), offset=offset, antialias=antialias) is positions


@pytest.mark.parametrize("grid", [(side, side + 1) for side in (1, 36, 37, 256)])
@pytest.mark.parametrize("stored", [14, 28, 37])
def test_offset_never_costs_a_cell(grid, stored):
    found = interpolate(torch.zeros(1, 1 + stored * stored, 1), grid, offset=0.1, antialias=False)
    assert found.shape[1] == 1 + grid[0] * grid[1]


def test_half_precision_is_resampled_in_single_with_gradients():
    positions = torch.randn(1, 26, 8, requires_grad=True)
    found = interpolate(positions.bfloat16(), (9, 7), offset=0.1, antialias=False)
    assert found.dtype == torch.bfloat16
    exact = interpolate(positions.bfloat16().float(), (9, 7), offset=0.1, antialias=False)
    assert torch.equal(found, exact.bfloat16())
    exact.square().sum().backward()
    assert (positions.grad != 0).all()
