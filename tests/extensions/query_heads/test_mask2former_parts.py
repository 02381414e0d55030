"""The parts of the Mask2Former head against slow references in float64: loops over points, cells and queries."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dinoseg.extensions.query_heads.mask2former import deformable
from dinoseg.extensions.query_heads.mask2former.adapter import Extractor, VitAdapter, drop_samples
from dinoseg.extensions.query_heads.mask2former.deformable import DeformableAttention, sample
from dinoseg.extensions.query_heads.mask2former.levels import cell_centres, sine_positions, to_maps, to_tokens
from dinoseg.extensions.query_heads.mask2former.pixel_decoder import PixelDecoder
from dinoseg.extensions.query_heads.mask2former.predictor import MaskedAttentionDecoder


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def shaken(module):
    """Give every parameter a value of its own: nothing stays at zero or one."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5 if parameter.ndim == 1 else parameter[0].numel() ** -0.5)
    return module.double().eval()


def read_bilinearly(level, x, y):
    """Read (h, w, D) at x and y, in cells with centres at .5; what lies outside is zero."""
    rows, columns, _ = level.shape
    value = torch.zeros_like(level[0, 0])
    for row in (math.floor(y - 0.5), math.floor(y - 0.5) + 1):
        for column in (math.floor(x - 0.5), math.floor(x - 0.5) + 1):
            if 0 <= row < rows and 0 <= column < columns:
                value += (1 - abs(y - 0.5 - row)) * (1 - abs(x - 0.5 - column)) * level[row, column]
    return value


def sample_in_loops(values, sizes, points, weights):
    batch, queries, heads, levels, count = weights.shape
    result = torch.zeros(batch, queries, heads, values.shape[-1], dtype=values.dtype)
    for image, head in itertools.product(range(batch), range(heads)):
        parts = values[image, :, head].split([rows * columns for rows, columns in sizes])
        maps = [part.view(*size, -1) for part, size in zip(parts, sizes, strict=True)]
        for query, level, point in itertools.product(range(queries), range(levels), range(count)):
            x, y = points[image, query, head, level, point].tolist()
            read = read_bilinearly(maps[level], x * sizes[level][1], y * sizes[level][0])
            result[image, query, head] += weights[image, query, head, level, point] * read
    return result.flatten(2)


def attend_in_loops(module, queries, centres, cells, sizes):
    heads, levels, count = module.shape
    offsets = module.sampling_offsets(queries).view(*queries.shape[:2], heads, levels, count, 2)
    scale = torch.tensor([[columns, rows] for rows, columns in sizes], dtype=queries.dtype)
    points = centres.view(1, -1, 1, 1, 1, 2) + offsets / scale.view(1, 1, 1, levels, 1, 2)
    weights = module.attention_weights(queries).view(*queries.shape[:2], heads, -1).softmax(-1)
    values = module.value_proj(cells).view(*cells.shape[:2], heads, -1)
    weights = weights.view(*queries.shape[:2], heads, levels, count)
    return module.output_proj(sample_in_loops(values, sizes, points, weights))


@pytest.mark.parametrize("sizes", [[(1, 1)], [(3, 2)], [(1, 4), (2, 3), (5, 1)]])
def test_sampling_equals_loops_over_points(sizes):
    cells = sum(rows * columns for rows, columns in sizes)
    values = torch.randn(2, cells, 3, 2, dtype=torch.float64)
    points = torch.rand(2, 4, 3, len(sizes), 5, 2, dtype=torch.float64) * 2 - 0.5  # a good part lies outside
    weights = torch.rand(points.shape[:-1], dtype=torch.float64)
    torch.testing.assert_close(sample(values, sizes, points, weights), sample_in_loops(values, sizes, points, weights))


def test_sampling_in_bands_of_queries_changes_nothing(monkeypatch):
    values = torch.randn(2, 6, 2, 3)
    points = torch.rand(2, 7, 2, 1, 4, 2)
    weights = torch.rand(points.shape[:-1])
    whole = sample(values, [(2, 3)], points, weights)
    for most in (1, 2 * 2 * 3 * 4 * 3):  # one query at a time; three
        monkeypatch.setattr(deformable, "AT_ONCE", most)
        assert torch.equal(sample(values, [(2, 3)], points, weights), whole)


def test_sampling_stays_in_float32_under_autocast(monkeypatch):
    seen = []

    def sample_and_watch(values, sizes, points, weights):
        seen.extend(part.dtype for part in (values, points, weights))
        return sample(values, sizes, points, weights)

    monkeypatch.setattr(deformable, "sample", sample_and_watch)
    with torch.autocast("cpu", torch.bfloat16):
        read = DeformableAttention(8, 2, 1)(torch.randn(1, 3, 8), torch.rand(3, 2), torch.randn(1, 4, 8), [(2, 2)])
    assert set(seen) == {torch.float32} and read.dtype == torch.bfloat16


def test_deformable_attention_starts_with_points_on_a_square():
    module = DeformableAttention(16, 8, 2)
    offsets = module.sampling_offsets.bias.detach().view(8, 2, 4, 2)
    torch.testing.assert_close(offsets.abs().amax(-1), torch.tensor([1.0, 2, 3, 4]).expand(8, 2, 4))
    torch.testing.assert_close(offsets[1, 0, 2], torch.tensor([3.0, 3.0]))  # an eighth turn, three cells away
    assert not module.sampling_offsets.weight.any() and not module.attention_weights.weight.any()


@pytest.mark.parametrize("sizes", [[(1, 1)], [(4, 6), (2, 3), (1, 2)], [(2, 1), (6, 2)]])
def test_tokens_and_maps_are_one_another_undone(sizes):
    maps = [torch.randn(2, 3, *size) for size in sizes]
    tokens = to_tokens(maps)
    centres = cell_centres(sizes, like=tokens)
    assert all(torch.equal(a, b) for a, b in zip(to_maps(tokens, sizes), maps, strict=True))
    last_rows, last_columns = sizes[-1]
    assert tokens.shape[1] == len(centres)
    torch.testing.assert_close(tokens[:, -1], maps[-1][:, :, -1, -1])
    torch.testing.assert_close(centres[-1], torch.tensor([1 - 0.5 / last_columns, 1 - 0.5 / last_rows]))


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 5)])
def test_sine_positions_equal_their_formula(rows, columns):
    like = torch.zeros(1, dtype=torch.float64)
    found = sine_positions((rows, columns), 16, like).view(rows, columns, 16)
    for row, column, channel in itertools.product(range(rows), range(columns), range(16)):
        place, of = (row, rows) if channel < 8 else (column, columns)  # y first
        angle = 2 * math.pi * (place + 1) / of / 10000 ** (2 * (channel % 8 // 2) / 8)
        wave = math.cos(angle) if channel % 2 else math.sin(angle)
        assert found[row, column, channel].item() == pytest.approx(wave, abs=1e-5)


def test_extractor_equals_loops():
    module = shaken(Extractor(16, 4, drop_path=0.9, checkpointing=False))  # no path is dropped in eval mode
    sizes = [(4, 2), (2, 1), (1, 1)]
    tokens, feature = (torch.randn(shape, dtype=torch.float64) for shape in ((2, 11, 16), (2, 16, 2, 1)))
    centres = cell_centres(sizes, like=tokens)
    cells = module.feat_norm(feature.flatten(2).transpose(1, 2))
    read = tokens + attend_in_loops(module.attn, module.query_norm(tokens), centres, cells, [(2, 1)])
    hidden = module.ffn.fc1(module.ffn_norm(read))
    mixed = []
    for first, last, size in ((0, 8, sizes[0]), (8, 10, sizes[1]), (10, 11, sizes[2])):
        part = hidden[:, first:last].transpose(1, 2).reshape(2, 4, *size)
        mixed.append(module.ffn.dwconv["dwconv"](part).flatten(2).transpose(1, 2))
    expected = read + module.ffn.fc2(F.gelu(torch.cat(mixed, 1)))
    torch.testing.assert_close(module(tokens, centres, sizes, feature), expected)


def test_pixel_decoder_returns_coarse_levels_first_in_float32():
    module = PixelDecoder(8, 64, 4, 16, checkpointing=False)
    pyramid = [torch.randn(2, 8, *size) for size in ((12, 8), (6, 4), (3, 2), (2, 1))]
    levels, mask_features = module(pyramid)
    assert [tuple(level.shape) for level in levels] == [(2, 64, 2, 1), (2, 64, 3, 2), (2, 64, 6, 4)]
    assert mask_features.shape == (2, 64, 12, 8)
    with torch.autocast("cpu", torch.bfloat16):
        again, mask_again = module(pyramid)
    assert torch.equal(mask_features, mask_again) and torch.equal(levels[-1], again[-1])


def test_pixel_decoder_equals_loops():
    module = shaken(PixelDecoder(8, 64, 4, 16, checkpointing=False))
    pyramid = [torch.randn(1, 8, *size, dtype=torch.float64) for size in ((4, 6), (2, 3), (1, 2), (1, 1))]
    sizes = [(1, 1), (1, 2), (2, 3)]
    inputs = [conv(level) for conv, level in zip(module.input_convs, pyramid[:0:-1], strict=True)]
    positions = torch.cat(
        [sine_positions(size, 64, pyramid[0]) + module.encoder.level_encoding[i] for i, size in enumerate(sizes)]
    )
    tokens = torch.cat([level.flatten(2).transpose(1, 2) for level in inputs], 1)
    for layer in module.encoder.encoder["layers"]:
        centres = cell_centres(sizes, like=tokens)
        read = attend_in_loops(layer.self_attn, tokens + positions, centres, tokens, sizes)
        tokens = layer.norm1(tokens + read)
        tokens = layer.norm2(tokens + layer.linear2(layer.linear1(tokens).relu()))
    levels, mask_features = module(pyramid)
    torch.testing.assert_close(torch.cat([level.flatten(2).transpose(1, 2) for level in levels], 1), tokens)
    lateral, output = module.lateral_convs[0], module.output_convs[0]
    above = F.interpolate(tokens[:, 3:].transpose(1, 2).reshape(1, 64, 2, 3), (4, 6), mode="bilinear")
    mixed = F.group_norm(F.conv2d(pyramid[0], lateral.weight), 32, lateral.norm.weight, lateral.norm.bias) + above
    mixed = F.group_norm(F.conv2d(mixed, output.weight, padding=1), 32, output.norm.weight, output.norm.bias).relu()
    torch.testing.assert_close(mask_features, module.mask_feature(mixed))


def test_dropped_samples_are_zero_and_the_others_scaled_up():
    update = torch.ones(4000, 2, 3)
    dropped = drop_samples(update, 0.25)
    torch.testing.assert_close(dropped.unique(), torch.tensor([0.0, 4 / 3]))
    assert dropped.mean().item() == pytest.approx(1, abs=0.05)
    assert (dropped.flatten(1).amax(1) == dropped.flatten(1).amin(1)).all()  # whole samples
    assert drop_samples(update, 0.0) is update


def decode_slowly(module, levels, mask_features):
    """Return (class logits, mask logits) before each layer and after the last, one image and query at a time."""
    rows = []
    for image in range(len(mask_features)):
        cells = [level[image].flatten(1).T + module.level_embed.weight[index] for index, level in enumerate(levels)]
        positions = [sine_positions(tuple(level.shape[-2:]), level.shape[1], level) for level in levels]
        queries = module.query_feat.weight
        places = module.query_embed.weight
        outputs = []
        for index in range(10):
            normed = module.post_norm(queries)
            first, second, third = module.mask_embed["layers"]
            masks = third(second(first(normed).relu()).relu()) @ mask_features[image].flatten(1)
            masks = masks.view(-1, *mask_features.shape[-2:])
            outputs.append((module.class_embed(normed), masks))
            if index == 9:
                break
            number = index % 3
            small = F.interpolate(masks[None], levels[number].shape[-2:], mode="bilinear")[0]
            read = []
            for query in range(len(queries)):
                open_cells = (small[query].flatten() >= 0).nonzero().flatten()
                if not len(open_cells):
                    open_cells = torch.arange(small[query].numel())
                keys = (cells[number] + positions[number])[open_cells]
                attention = torch_attention(module.transformer_cross_attention_layers[index].multihead_attn)
                asked = (queries + places)[query : query + 1]
                read.append(attention(asked, keys, cells[number][open_cells])[0])
            queries = module.transformer_cross_attention_layers[index].norm(queries + torch.cat(read))
            layer = module.transformer_self_attention_layers[index]
            placed = queries + places
            queries = layer.norm(queries + torch_attention(layer.self_attn)(placed, placed, queries)[0])
            layer = module.transformer_ffn_layers[index]
            queries = layer.norm(queries + layer.linear2(layer.linear1(queries).relu()))
        rows.append(outputs)
    return rows


def torch_attention(module):
    reference = nn.MultiheadAttention(module.out_proj.out_features, module.num_heads).double()
    reference.load_state_dict(module.state_dict())
    return reference


def test_masked_decoder_equals_one_query_at_a_time():
    module = shaken(MaskedAttentionDecoder(16, 4, 24, num_queries=6, num_outputs=3))
    levels = [torch.randn(3, 16, *size, dtype=torch.float64) for size in ((2, 1), (3, 2), (6, 4))]
    mask_features = torch.randn(3, 16, 12, 8, dtype=torch.float64)
    shift = 20 * torch.randn(16, 1, 1, dtype=torch.float64)
    mask_features[0] += shift  # queries cover the whole of one of these images, and nothing of the other
    mask_features[1] -= shift
    outputs = module.train()(levels, mask_features, deep=True)
    shares = torch.stack([(aux.mask_logits < 0).double().mean((-2, -1)) for aux in outputs.aux])
    assert shares.min() == 0 and shares.max() == 1  # the case holds full and empty masks
    for image, expected in enumerate(decode_slowly(module, levels, mask_features)):
        for found, (classes, masks) in zip([*outputs.aux, outputs], expected, strict=True):
            torch.testing.assert_close(found.class_logits[image], classes)
            torch.testing.assert_close(found.mask_logits[image], masks)
    evaluated = module.eval()(levels, mask_features, deep=False)
    assert len(outputs.aux) == 9 and not evaluated.aux and not any(aux.aux for aux in outputs.aux)
    assert torch.equal(outputs.class_logits, evaluated.class_logits)
    assert torch.equal(outputs.mask_logits, evaluated.mask_logits)


@pytest.mark.parametrize(("rows", "columns", "patch"), [(1, 1, 16), (3, 2, 8), (3, 5, 14)])
def test_adapter_fits_its_pyramid_to_any_grid_and_patch(rows, columns, patch):
    module = VitAdapter(16, 2, drop_path=0.0, checkpointing=False).eval()
    features = [torch.randn(2, 16, rows, columns)] * 4
    pixels = torch.randn(2, 3, patch * rows, patch * columns)
    maps = module(features, pixels)
    sides = [(4 * side, 2 * side, side, math.ceil(side / 2)) for side in (rows, columns)]
    assert [tuple(level.shape[-2:]) for level in maps] == list(zip(*sides, strict=True))
    resized = F.interpolate(pixels, (16 * rows, 16 * columns), mode="bilinear")  # 16 pixels a token, whatever the patch
    assert all(map(torch.equal, maps, module(features, resized)))
