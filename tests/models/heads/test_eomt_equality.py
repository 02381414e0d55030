import math

import pytest
import torch
import torch.nn.functional as F
from eomt_making import FAMILIES, pair, spy_on_attention


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def read_slowly(head, tokens, grid):
    """Class logits (B, Q, K + 1) and mask logits (B, Q, h', w'), a query and a patch at a time."""
    count = len(head.queries)
    features = tokens[:, -grid[0] * grid[1] :].reshape(len(tokens), *grid, -1).permute(0, 3, 1, 2)
    for step in head.upscale:
        features = F.conv_transpose2d(features, step.grow.weight, step.grow.bias, stride=2)
        features = 0.5 * features * (1 + torch.erf(features / math.sqrt(2)))
        padded = F.pad(features, (1, 1, 1, 1))
        height, width = features.shape[-2:]
        features = sum(
            step.mix.weight[:, 0, y, x].view(-1, 1, 1) * padded[..., y : y + height, x : x + width]
            for y in range(3)
            for x in range(3)
        )
        centred = features - features.mean(1, keepdim=True)
        features = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
        features = features * step.norm.weight.view(-1, 1, 1) + step.norm.bias.view(-1, 1, 1)
    classes = tokens[:, :count] @ head.classify.weight.T + head.classify.bias
    embedding = head.mask_embed(tokens[:, :count])
    masks = [[(embedding[b, q].view(-1, 1, 1) * features[b]).sum(0) for q in range(count)] for b in range(len(tokens))]
    return classes, torch.stack([torch.stack(rows) for rows in masks])


def run_slowly(backbone, head, images):
    """The training forward with every mask in place: transformers' own attention, given dense N x N masks."""
    backbone.model.config._attn_implementation = "eager"
    pixels = backbone.pixels(images)
    grid = tuple(side // backbone.patch_size for side in pixels.shape[-2:])
    tokens, beside = backbone.embed(pixels)
    found = []
    for number, block in enumerate(backbone.blocks):
        left = len(backbone.blocks) - number
        if left == head.blocks:
            tokens = torch.cat([torch.stack([head.queries] * len(images)), tokens], dim=1)
        bias = None
        if left <= head.blocks:
            found.append(read_slowly(head, backbone.norm(tokens), grid))
            logits = F.interpolate(found[-1][1], grid, mode="bilinear")
            bias = torch.zeros(len(images), 1, tokens.shape[1], tokens.shape[1], dtype=tokens.dtype)
            first = tokens.shape[1] - grid[0] * grid[1]
            for image, query, y, x in (logits <= 0).nonzero().tolist():
                bias[image, 0, query, first + y * grid[1] + x] = -math.inf
        tokens = block(tokens, attention_mask=bias, **beside)
    found.append(read_slowly(head, backbone.norm(tokens), grid))
    return found


def test_training_equals_an_explicit_forward_with_dense_masks(family):
    backbone, head = pair(family)
    images = torch.rand(2, 3, 45, 61, dtype=torch.float64)
    outputs = head.double().run(backbone.double(), images)
    expected = run_slowly(backbone, head, images)
    assert len(outputs.aux) == 2
    assert 0.05 < (expected[0][1] > 0).double().mean() < 0.95  # masks that hide something and show something
    for found, (classes, masks) in zip([*outputs.aux, outputs], expected, strict=True):
        torch.testing.assert_close(found.class_logits, classes)
        torch.testing.assert_close(found.mask_logits, masks)


def published_model(backbone, head, size):
    """Transformers' own model of the published code, with the same weights; images of one size only."""
    from transformers import EomtDinov3Config, EomtDinov3ForUniversalSegmentation

    arch, patch = FAMILIES["dinov3_vit"]
    options = {"pos_embed_rescale": None, "image_size": size, "patch_size": patch, "layer_norm_eps": 1e-5}
    options |= {
        "num_queries": len(head.queries),
        "num_blocks": head.blocks,
        "num_labels": head.classify.out_features - 1,
    }
    model = EomtDinov3ForUniversalSegmentation(EomtDinov3Config(**arch, **options))
    upscale = {"grow": "conv1", "mix": "conv2", "norm": "layernorm2d"}
    weights = {"query.weight": head.queries}
    weights |= {f"class_predictor.{name}": part for name, part in head.classify.state_dict().items()}
    weights |= {f"layernorm.{name}": part for name, part in backbone.norm.state_dict().items()}
    weights |= {f"layers.{name}": part for name, part in backbone.blocks.state_dict().items()}
    weights |= {f"embeddings.{name}": part for name, part in backbone.model.embeddings.state_dict().items()}
    for number in range(3):
        linear = head.mask_embed[2 * number]
        weights |= {f"mask_head.fc{number + 1}.{name}": part for name, part in linear.state_dict().items()}
    for number, step in enumerate(head.upscale):
        for ours, theirs in upscale.items():
            part = getattr(step, ours).state_dict()
            weights |= {f"upscale_block.block.{number}.{theirs}.{name}": value for name, value in part.items()}
    missing, extra = model.load_state_dict(weights, strict=False)
    assert set(missing) <= {"attn_mask_probs", "criterion.empty_weight"} and set(extra) <= {"embeddings.mask_token"}
    return model.eval()


@pytest.mark.parametrize("masked", [True, False])
def test_head_equals_the_model_of_transformers(masked):
    backbone, head = pair()
    images = torch.rand(2, 3, 64, 64)
    model = published_model(backbone, head, size=64)
    model.attn_mask_probs.fill_(float(masked))
    expected = model(backbone.pixels(images))
    outputs = head.train(masked).run(backbone, images)
    torch.testing.assert_close(outputs.class_logits, expected.class_queries_logits, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(outputs.mask_logits, expected.masks_queries_logits, atol=1e-4, rtol=1e-4)


def test_eval_is_a_plain_transformer_with_more_tokens(family, monkeypatch):
    backbone, head = pair(family)
    backbone, head = backbone.eval(), head.eval()
    images = torch.rand(2, 3, 40, 33)
    pixels = backbone.pixels(images)
    tokens, beside = backbone.embed(pixels)
    tokens = backbone.blocks[0](tokens, **beside)
    tokens = torch.cat([head.queries.expand(2, -1, -1), tokens], dim=1)
    for block in backbone.blocks[1:]:
        tokens = block(tokens, **beside)
    grid = tuple(side // backbone.patch_size for side in pixels.shape[-2:])
    classes, masks = read_slowly(head, backbone.norm(tokens), grid)
    calls = spy_on_attention(monkeypatch)
    outputs = head.run(backbone, images)
    torch.testing.assert_close(outputs.class_logits, classes, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(outputs.mask_logits, masks, atol=1e-4, rtol=1e-4)
    assert outputs.aux == []
    assert [mask for *_, mask in calls] == [None] * 3
