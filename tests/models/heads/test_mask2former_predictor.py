"""The masked-attention decoder against torch's attention, one query at a time, in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dinoseg.models.heads.mask2former.levels import sine_positions
from dinoseg.models.heads.mask2former.predictor import Attention, MaskedAttentionDecoder


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def shaken(module):
    """Give every parameter a value of its own: nothing stays at zero or one."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5 if parameter.ndim == 1 else parameter[0].numel() ** -0.5)
    return module.double().eval()


@pytest.mark.parametrize("masked", [False, True])
def test_attention_equals_torchs_with_the_same_parameters(masked):
    module = shaken(Attention(12, 3))
    reference = nn.MultiheadAttention(12, 3, batch_first=True).double()
    reference.load_state_dict(module.state_dict())  # of the same names
    queries, keys, values = (torch.randn(2, count, 12, dtype=torch.float64) for count in (4, 7, 7))
    blocked = per_head = None
    if masked:
        blocked = torch.rand(2, 1, 4, 7) < 0.5
        blocked[..., 0] = False
        per_head = blocked.expand(-1, 3, -1, -1).flatten(0, 1)
    expected = reference(queries, keys, values, attn_mask=per_head, need_weights=False)[0]
    torch.testing.assert_close(module(queries, keys, values, blocked), expected)


def decode_slowly(module, levels, mask_features):
    """Return (class logits, mask logits) before each layer and after the last, one image and query at a time."""
    rows = []
    for image in range(len(mask_features)):
        cells = [level[image].flatten(1).T + module.level_embed.weight[index] for index, level in enumerate(levels)]
        positions = [sine_positions(tuple(level.shape[-2:]), level.shape[1], level) for level in levels]
        queries, places, outputs = module.query_feat.weight, module.query_embed.weight, []
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


@pytest.fixture
def decoder_case():
    module = shaken(MaskedAttentionDecoder(16, 4, 24, num_queries=6, num_outputs=3))
    levels = [torch.randn(3, 16, *size, dtype=torch.float64) for size in ((2, 1), (3, 2), (6, 4))]
    mask_features = torch.randn(3, 16, 12, 8, dtype=torch.float64)
    shift = 20 * torch.randn(16, 1, 1, dtype=torch.float64)
    mask_features[0] += shift  # queries cover the whole of one of these images, and nothing of the other
    mask_features[1] -= shift
    return module, levels, mask_features


def test_masked_decoder_equals_one_query_at_a_time(decoder_case):
    module, levels, mask_features = decoder_case
    outputs = module.train()(levels, mask_features, deep=True)
    shares = torch.stack([(aux.mask_logits < 0).double().mean((-2, -1)) for aux in outputs.aux])
    assert shares.min() == 0 and shares.max() == 1  # the case holds full and empty masks
    for image, expected in enumerate(decode_slowly(module, levels, mask_features)):
        for found, (classes, masks) in zip([*outputs.aux, outputs], expected, strict=True):
            torch.testing.assert_close(found.class_logits[image], classes)
            torch.testing.assert_close(found.mask_logits[image], masks)


def test_decoder_gives_earlier_layers_in_training_only(decoder_case):
    module, levels, mask_features = decoder_case
    trained, evaluated = (
        module.train()(levels, mask_features, deep=True),
        module.eval()(levels, mask_features, deep=False),
    )
    assert len(trained.aux) == 9 and not evaluated.aux
    assert torch.equal(trained.class_logits, evaluated.class_logits)
    assert torch.equal(trained.mask_logits, evaluated.mask_logits)
    assert not any(aux.aux for aux in trained.aux)
