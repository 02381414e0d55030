import random

import pytest
import torch

from dinoseg.core.geometry import (
    concatenate,
    lattice,
    pad_to_multiple,
    reduce_tile,
    resize,
    spans,
    upsample,
    upsample_tile,
    valid_share,
)
from dinoseg.core.sizes import evenly_spaced


def weights_of(cells, length, share=1.0, width=1.0):
    """Return what each of `length` pixels reads of `cells`: a triangle around (y + 0.5) * cells * share / length."""
    places = (torch.arange(length, dtype=torch.float64) + 0.5) * cells * share / length
    near = (1 - (torch.arange(cells) + 0.5 - places[:, None]).abs() / width).clamp(min=0)
    return near / near.sum(dim=1, keepdim=True)


def reference(grid, size, valid):
    """Bilinear sampling, written out, in float64."""
    down, along = map(weights_of, grid.shape[-2:], size, valid)
    return down @ grid @ along.T


def test_upsample_agrees_with_the_explicit_formula_at_any_size():
    draw = random.Random(0)
    for _ in range(500):
        patch = draw.choice([8, 14, 16])
        image = (draw.randint(1, 120), draw.randint(1, 120))
        longest = draw.choice([20, 200])  # the short ones are often as long as the grid
        size = (draw.randint(1, longest), draw.randint(1, longest))
        valid = valid_share(image, patch)
        grid = torch.randn(1, 2, -(-image[0] // patch), -(-image[1] // patch), dtype=torch.float64)
        result = upsample(grid, size, valid)
        assert result.shape[-2:] == size, (image, size, patch)
        torch.testing.assert_close(result, reference(grid, size, valid), atol=1e-6, rtol=0)


def test_spans_are_the_rows_of_upsample_in_runs():
    draw = random.Random(1)
    for _ in range(150):
        image, length, at_once = draw.randint(1, 60), draw.randint(1, 90), draw.randint(1, 40)
        cells, (share, _) = -(-image // 8), valid_share((image, 1), 8)
        grid = torch.randn(1, 1, cells, 1, dtype=torch.float64)
        expected = reference(grid, (length, 1), (share, 1.0))[0, 0]
        done = 0
        for span in spans(length, cells, share, at_once, grid):
            read = grid[0, 0, span.cells]
            result = read if span.weights is None else span.weights @ read
            torch.testing.assert_close(result, expected[span.pixels], atol=1e-12, rtol=0)
            assert span.pixels.start == done and len(result) <= at_once
            done = span.pixels.stop
        assert done == length


def test_tiles_are_those_of_upsample_and_their_gradient_its_own():
    draw = random.Random(2)
    pieces = 0
    for _ in range(60):
        size = (draw.randint(1, 40), draw.randint(150, 700))
        patch = draw.choice([2, 3, 4, 16])
        image = (size[0], size[1] if draw.random() < 0.5 else draw.randint(150, 700))
        valid = valid_share(image, patch)
        grid = torch.randn(1, 3, *(-(-side // patch) for side in image), dtype=torch.float64, requires_grad=True)
        expected = upsample(grid, size, valid)[0]
        (rows,) = spans(size[0], grid.shape[2], valid[0], size[0], grid)
        at_once = draw.randint(100, 700)
        for columns in spans(size[1], grid.shape[3], valid[1], at_once, grid):
            pieces += len(columns.pieces)
            read = grid.detach()[0, :, rows.cells, columns.cells]
            tile = upsample_tile(read, rows, columns)
            torch.testing.assert_close(tile, expected[..., columns.pixels], atol=1e-6, rtol=0)
            upstream = torch.randn_like(tile)
            (own,) = torch.autograd.grad(expected[..., columns.pixels], grid, upstream, retain_graph=True)
            back = torch.zeros_like(own)
            back[0, :, rows.cells, columns.cells] = reduce_tile(upstream, rows, columns)
            torch.testing.assert_close(back, own, atol=1e-5, rtol=0)
            tile.zero_()
            assert read.any()  # the tile has memory of its own
    assert pieces > 50


@pytest.mark.parametrize("size", [(6, 5), (12, 5), (6, 10)], ids=["neither", "rows", "columns"])
def test_tile_aligned_with_cells_has_its_own_memory(size):
    grid = torch.randn(1, 2, 6, 5, dtype=torch.float64, requires_grad=True)
    expected, read = upsample(grid, size, (1.0, 1.0))[0], grid.detach()[0]
    ((rows,), (columns,)) = (spans(*sides, 1.0, sides[0], grid) for sides in zip(size, (6, 5), strict=True))
    tile = upsample_tile(read, rows, columns)
    torch.testing.assert_close(tile, expected.detach(), atol=1e-12, rtol=0)
    upstream = torch.randn_like(tile)
    (own,) = torch.autograd.grad(expected, grid, upstream)
    torch.testing.assert_close(reduce_tile(upstream, rows, columns), own[0], atol=1e-12, rtol=0)
    tile.zero_()
    assert read.any()


def test_resizing_is_split_into_pieces_only_on_a_cpu():
    grid = torch.empty(1)
    assert not spans(480, 30, 1.0, 480, grid)[0].pieces  # few cells are read: one product
    assert [piece.weights.shape[1] for piece in spans(480, 240, 1.0, 480, grid)[0].pieces] == [49, 50, 50, 50, 49]
    assert [len(piece.weights) for piece in spans(150, 140, 1.0, 150, grid)[0].pieces] == [64, 64, 22]
    assert not spans(64, 60, 1.0, 64, grid)[0].pieces
    half = spans(480, 480, 0.5, 480, grid)[0].pieces  # the pixels lie on half of the cells
    assert [len(piece.weights) for piece in half] == [96] * 5
    elsewhere = spans(480, 240, 1.0, 480, torch.empty(1, device="meta"))[0]
    assert elsewhere.weights.shape == (480, 240) and not elsewhere.pieces


def test_pixels_of_a_padded_image_are_only_cropped():
    pixels = torch.randn(1, 2, 48, 64)
    assert torch.equal(upsample(pixels, (45, 61), valid_share((45, 61), 16)), pixels[..., :45, :61])


def test_maps_are_joined_on_the_finest_grid():
    fine, coarse = torch.randn(2, 3, 8, 12), torch.randn(2, 5, 4, 6)
    joined = concatenate([coarse, fine])
    assert torch.equal(joined[:, 5:], fine)
    torch.testing.assert_close(joined[:, :5], upsample(coarse, (8, 12), (1.0, 1.0)))


@pytest.mark.parametrize("size", [(56, 72), (61, 90), (7, 90)], ids=["whole", "scaled", "one axis"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_left_before_upsampling(size, dtype):
    grid = torch.randn(1, 2, 7, 9, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        result = upsample(grid, size, (1.0, 1.0))
    torch.testing.assert_close(result, upsample(grid.float(), size, (1.0, 1.0)), atol=0, rtol=0)


@pytest.mark.parametrize("size", [(1, 1), (15, 16), (540, 960), (33, 1)])
def test_padding_keeps_the_image_and_adds_zeros(size):
    image = torch.rand(1, 3, *size) + 1
    padded = pad_to_multiple(image, 16)
    assert padded.shape[-2] % 16 == 0 and padded.shape[-1] % 16 == 0
    assert torch.equal(padded[..., : size[0], : size[1]], image)
    assert padded.sum() == pytest.approx(image.sum().item(), rel=1e-5)
    share = valid_share(size, 16)
    assert share == (size[0] / padded.shape[-2], size[1] / padded.shape[-1])


@pytest.mark.parametrize("size", [(1, 1), (15, 16), (540, 960), (33, 1), (30000, 20), (20000, 20000)], ids=str)
def test_a_lattice_is_even_and_of_about_a_thousand_points(size):
    rows, columns = (range(length)[part] for length, part in zip(size, lattice(size), strict=True))
    assert min(size[0] * size[1], 700) <= len(rows) * len(columns) <= 1300
    for places, length in ((rows, size[0]), (columns, size[1])):
        assert abs(places[0] - (length - 1 - places[-1])) <= places.step  # as far from either end


@pytest.mark.parametrize("size", [(30, 1), (1, 30), (30, 2), (90, 1), (1, 1)])
@pytest.mark.parametrize("channels", [1, 3])
def test_resize_keeps_a_single_column_apart_from_its_rows(size, channels):
    images = torch.rand(2, channels, 60, 20, dtype=torch.float64)
    # triangles are widened where pixels become fewer
    down, along = (weights_of(old, new, width=max(1.0, old / new)) for old, new in zip((60, 20), size, strict=True))
    wanted = down @ images @ along.T
    torch.testing.assert_close(resize(images, size), wanted, atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    ("length", "count", "indices"),
    [(0, 3, []), (1, 3, [0]), (3, 5, [0, 1, 2]), (5, 1, [0]), (5, 2, [0, 4]), (101, 5, [0, 25, 50, 75, 100])],
)
def test_evenly_spaced_indices(length, count, indices):
    assert evenly_spaced(length, count) == indices
