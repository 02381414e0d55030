import math
from itertools import cycle
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from eomt_making import FAMILIES, pair, spy_on_attention

from dinoseg.extensions.query_heads import eomt
from dinoseg.extensions.query_heads.eomt import EomtHead, annealing_windows, attention_mask, masked_share
from dinoseg.models.adapters import Frozen, Full, LastBlocks, Lora
from dinoseg.models.backbones.transformers_vit import TransformersVit
from dinoseg.models.heads.semantic import semantic_map
from dinoseg.models.model import SegmentationModel

TIMM = ["test_vit", "test_vit2", "test_vit3"]  # a class token; a register alone; neither, with layer scale
ADAPTERS = [Full(), LastBlocks(1), Lora(2, 2, dropout=0.1, blocks=2), Lora(2, 2), Frozen()]


def test_attention_masks_cover_only_queries_and_stop_annealed(monkeypatch):
    backbone, head = pair(anneal=[[0.2, 0.5], [0.4, 0.8]])
    calls = spy_on_attention(monkeypatch)
    resize = Mock(side_effect=F.interpolate)
    monkeypatch.setattr(eomt.F, "interpolate", resize)
    tokens = 5 + 5 + 12
    for progress, masked in ((0.0, 2), (0.49, 2), (0.5, 1), (0.79, 1), (0.8, 0), (0.999, 0)):
        calls.clear()
        resize.reset_mock()
        head.set_progress(round(1000 * progress), 1000)
        outputs = head.run(backbone, torch.rand(2, 3, 48, 64))
        assert len(outputs.aux) == 2  # deep supervision goes on
        masks = [mask for *_, mask in calls if mask is not None]
        assert [tuple(mask.shape) for mask in masks] == [(2, 1, 5, tokens)] * masked
        assert [rows for rows, *_ in calls] == [17, *[tokens] * (2 - masked), *[5, 17] * masked]
        assert resize.call_count == masked  # no mask is made and left unused


def test_attention_mask_is_open_for_positive_logits():
    logits = torch.full((1, 2, 4, 6), -1.0)
    logits[0, 0, :2, 2:4] = 1.0  # one cell of the 2 x 3 grid: row 0, column 1
    mask = attention_mask(logits, (2, 3), num_tokens=2 + 5 + 6, share=1.0)
    assert mask.shape == (1, 1, 2, 13)
    assert mask[..., :7].all()
    assert mask[0, 0, 0, 7:].tolist() == [False, True, False, False, False, False]
    assert not mask[0, 0, 1, 7:].any()


def test_query_with_an_empty_mask_attends_to_queries_and_prefix():
    backbone, head = pair()
    with torch.no_grad():
        head.mask_embed[-1].weight.zero_()
        head.mask_embed[-1].bias.zero_()  # every logit 0: no patch is inside any mask
    images = torch.rand(1, 3, 32, 32)
    first, second = head.run(backbone, images), head.run(backbone, 1 - images)
    assert first.mask_logits.eq(0).all() and torch.isfinite(first.class_logits).all()
    first.class_logits.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in backbone.parameters() if p.grad is not None)
    assert not torch.equal(first.class_logits, second.class_logits)  # through the class and register tokens


def test_masks_are_left_out_with_the_share_that_is_given():
    torch.manual_seed(0)
    logits = torch.full((50, 40, 2, 2), -1.0)
    for share in (0.1, 0.5, 0.9):
        mask = attention_mask(logits, (2, 2), 7, share)
        masked = ~mask[:, 0, :, 3:].all(-1)
        assert torch.equal(masked, ~mask[:, 0, :, 3:].any(-1))  # a mask goes as a whole
        assert abs(masked.float().mean().item() - share) < 0.04
    assert not attention_mask(logits, (2, 2), 7, 1.0)[..., 3:].any()
    assert attention_mask(logits, (2, 2), 7, 0.0) is None


def official_share(start, step, end):
    """Return the probability of a mask at a step (EoMT's `mask_annealing`)."""
    if step < start:
        return 1.0
    return 0.0 if step >= end else float(np.power(1 - (step - start) / (end - start), 0.9))


def test_annealing_in_steps_is_that_of_the_published_configs(monkeypatch):
    published = [[0, 3000], [6520, 9780], [9780, 13040], [13040, 16300]]  # ADE20K, DINOv3-L
    backbone, head = pair(blocks=3, anneal=published[1:])
    shares = []
    monkeypatch.setattr(eomt, "attention_mask", lambda *given: shares.append(given[-1]))
    before = {name: value.clone() for name, value in head.state_dict().items()}
    for step in (0, 6519, 6520, 7001, 9779, 9780, 13039, 15555, 16299, 16300, 19559):
        shares.clear()
        head.set_progress(step, 19560)
        head.run(backbone, torch.rand(1, 3, 16, 16))
        assert shares == pytest.approx([official_share(start, step, end) for start, end in published[1:]], rel=1e-12)
    assert before.keys() == head.state_dict().keys()  # progress is no part of a checkpoint
    for start, end in (*published, (0.2, 0.6), (0.5, 0.5), (0.0, 0.0), (1.0, 1.0)):
        for progress in (0.0, 0.19, 0.2, 0.4, 0.49, 0.5, 0.9, 0.999, 1234):
            expected = official_share(start, progress, end)
            assert masked_share(progress, (start, end)) == pytest.approx(expected, rel=1e-12)


def test_steps_after_the_end_of_the_training_are_reported():
    _, head = pair(anneal=[[0, 30], [30, 60]])
    assert head.length_warning(60) is None and pair()[1].length_warning(1) is None
    message = head.length_warning(59)
    assert message.startswith("The head's anneal removes attention masks until step 60, but the training has 59 steps.")


@pytest.mark.parametrize(
    ("blocks", "steps", "starts", "ends"),
    [  # of published recipes, with the steps in all
        (4, 39153, [6520, 13040, 19560, 26080], [13040, 19560, 26080, 32600]),  # ADE20K, ViT-L
        (4, 88716, [14782, 29564, 44346, 59128], [29564, 44346, 59128, 73910]),  # COCO, ViT-L
        (3, 177432, [29564, 73910, 118256], [59128, 103474, 147820]),  # COCO, ViT-S
        (3, 19902, [3317, 8292, 13268], [6634, 11609, 16585]),  # Cityscapes, ViT-B
    ],
)
def test_even_windows_are_the_published_ones(blocks, steps, starts, ends):
    for (start, end), first, last in zip(annealing_windows("even", blocks), starts, ends, strict=True):
        assert start * steps == pytest.approx(first, rel=2e-3)
        assert end * steps == pytest.approx(last, rel=2e-3)


@pytest.mark.parametrize(("patch", "stride"), [(16, 4), (14, 3.5), (32, 4), (4, 2)])
def test_masks_have_about_four_pixels_a_cell(patch, stride):
    backbone = TransformersVit("dinov3_vit", FAMILIES["dinov3_vit"][0], "random", patch).eval()
    head = EomtHead(24, 1, 4, patch_size=patch, blocks=1, num_queries=2)
    outputs = head.eval().run(backbone, torch.rand(1, 3, 2 * patch, 3 * patch))
    assert outputs.mask_logits.shape == (1, 2, 2 * patch / stride, 3 * patch / stride)


@pytest.mark.parametrize(
    ("family", "size", "no_object"),
    [("vit", (45, 61), True), ("dinov2", (1, 1), False), ("dinov3_vit", (16, 130), True), ("vit", (64, 48), False)],
)
def test_maps_have_the_size_of_the_image(family, size, no_object):
    model = SegmentationModel(*pair(family, no_object=no_object)).eval()
    images = torch.rand(1, 3, *size)
    prediction = model(images)
    assert prediction.mixture and prediction.outputs.class_logits.shape == (1, 5, 4 + no_object)
    scores = prediction.scores()
    assert scores.shape == (1, 4, *size) and (scores >= 0).all()
    expected = semantic_map(prediction.outputs, size, prediction.valid, no_object)
    torch.testing.assert_close(scores, expected)
    assert torch.isfinite(prediction.logits()).all()


@pytest.mark.parametrize(
    ("adapter", "progress"), [*zip(ADAPTERS, cycle((0.4, 0.9, 0.0)), strict=False), (Full(), 0.0), (Full(), 0.9)]
)
@pytest.mark.parametrize("family", ["dinov3_vit", "test_vit"])
def test_gradients_reach_all_that_is_trained_and_nothing_else(family, adapter, progress):
    model = SegmentationModel(*pair(family, adapter=adapter)).train()
    model.set_progress(round(1000 * progress), 1000)
    outputs = model(torch.rand(2, 3, 40, 33)).outputs
    parts = [outputs, *outputs.aux]
    sum(part.class_logits.square().mean() + part.mask_logits.square().mean() for part in parts).backward()
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert reached == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {f"head.{name}" for name, _ in model.head.named_parameters()} <= reached
    for name, parameter in model.named_parameters():
        if name in reached and "lora_A" not in name:  # their partner starts at zero
            assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize(
    ("adapter", "family"),
    [*zip(ADAPTERS, cycle(FAMILIES), strict=False), (Full(), "test_vit"), (Lora(2, 2, dropout=0.1), "test_vit2")],
)
def test_checkpointing_changes_no_gradient(family, adapter, monkeypatch):
    calls = spy_on_attention(monkeypatch)
    gradients = []
    passes = []
    for checkpointing in (False, True):
        model = SegmentationModel(*pair(family, 3, adapter=adapter, held={"checkpointing": checkpointing})).train()
        model.set_progress(3, 10)  # the first block's masks are left out at random
        calls.clear()
        torch.manual_seed(1)
        outputs = model(torch.ones(2, 3, 40, 33).cumsum(3) / 33).outputs
        sum(part.class_logits.sum() + part.mask_logits.square().mean() for part in [outputs, *outputs.aux]).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        passes.append(len(calls))
    assert passes[1] == 2 * passes[0]
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@pytest.mark.parametrize(
    ("family", "adapter", "checkpointing"),
    [("vit", Frozen(), False), ("dinov2", Lora(2, 2), True), ("dinov3_vit", Lora(2, 2), False)],
)
def test_half_precision_backbone_works_with_float32_head(family, adapter, checkpointing):
    held = {"dtype": "bfloat16", "checkpointing": checkpointing}
    model = SegmentationModel(*pair(family, adapter=adapter, held=held)).train()
    images = torch.rand(2, 3, 40, 33)
    for progress in (0, 999):
        model.set_progress(progress, 1000)
        outputs = model(images).outputs
        parts = [outputs, *outputs.aux]
        assert all(part.class_logits.dtype == part.mask_logits.dtype == torch.float32 for part in parts)
        sum(part.class_logits.square().mean() + part.mask_logits.square().mean() for part in parts).backward()
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert any("lora_B" in name for name in trainable) == isinstance(adapter, Lora)
    assert all(torch.isfinite(p.grad).all() for p in trainable.values())
    assert all(p.grad.any() for name, p in trainable.items() if "lora_A" not in name)  # their partner starts at zero
    exact = SegmentationModel(*pair(family, adapter=adapter)).eval()
    expected = exact(images).scores()
    torch.testing.assert_close(model.eval()(images).scores(), expected, atol=0.1, rtol=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        scores = exact(images).scores()
    torch.testing.assert_close(scores, expected, atol=0.1, rtol=0.1)


def test_parameters_are_those_of_the_published_head():
    with torch.device("meta"):
        head = EomtHead(1024, 1, 150, patch_size=16, num_queries=100)
    dim = 1024
    doubling = 4 * 1024**2 + 1024 + 9 * 1024 + 2 * 1024
    expected = 100 * dim + (dim + 1) * 151 + 3 * (dim + 1) * dim + 2 * doubling
    assert sum(parameter.numel() for parameter in head.parameters()) == expected


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


def embed_plainly(backbone, images):
    """Return the tokens of the library's own forward, and the library's name of masks; its attention is unfused."""
    if hasattr(backbone.model, "config"):
        backbone.model.config._attn_implementation = "eager"
        return backbone.embed(images), "attention_mask"
    for part in backbone.modules():
        vars(part).update({"fused_attn": False} if hasattr(part, "fused_attn") else {})
    inputs = []
    with backbone.blocks[0].register_forward_pre_hook(lambda _, given: inputs.append(given[0])):
        backbone.model.forward_features(backbone.pixels(images))
    return inputs[0], "attn_mask"


def run_slowly(backbone, head, images):
    """The forward with every mask in place if it trains: the library's own attention, given dense N x N masks."""
    grid = tuple(-(-side // backbone.patch_size) for side in images.shape[-2:])
    tokens, mask_name = embed_plainly(backbone, images)
    beside = backbone.block_kwargs(images.shape[-2:])
    found = []
    for number, block in enumerate(backbone.blocks):
        left = len(backbone.blocks) - number
        if left == head.joint_blocks:
            tokens = torch.cat([torch.stack([head.queries] * len(images)), tokens], dim=1)
        bias = None
        if left <= head.joint_blocks and head.training:
            found.append(read_slowly(head, backbone.norm(tokens), grid))
            logits = F.interpolate(found[-1][1], grid, mode="bilinear")
            bias = torch.zeros(len(images), 1, tokens.shape[1], tokens.shape[1], dtype=tokens.dtype)
            first = tokens.shape[1] - grid[0] * grid[1]
            for image, query, y, x in (logits <= 0).nonzero().tolist():
                bias[image, 0, query, first + y * grid[1] + x] = -math.inf
        tokens = block(tokens, **{mask_name: bias}, **beside)
    found.append(read_slowly(head, backbone.norm(tokens), grid))
    return found


def published_model(backbone, head, size):
    """Transformers' own model of the published code, with the same weights; images of one size only."""
    from transformers import EomtDinov3Config, EomtDinov3ForUniversalSegmentation

    arch, patch = FAMILIES["dinov3_vit"]
    options = {"pos_embed_rescale": None, "image_size": size, "patch_size": patch, "layer_norm_eps": 1e-5}
    options |= {
        "num_queries": len(head.queries),
        "num_blocks": head.joint_blocks,
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


def shake(module):
    """Move all norms, factors and positions away from their initial values."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) / 5)


@pytest.mark.parametrize("family", [*FAMILIES, *TIMM])
@pytest.mark.parametrize("training", [True, False])
def test_outputs_and_gradients_equal_a_forward_with_dense_masks(family, training, monkeypatch):
    backbone, head = (part.double().train(training) for part in pair(family))
    if family not in FAMILIES:
        shake(backbone)
    images = torch.rand(2, 3, 45, 61, dtype=torch.float64)
    calls = spy_on_attention(monkeypatch)
    outputs = head.run(backbone, images)
    assert len(outputs.aux) == 2 * training
    if family in FAMILIES:
        assert sum(mask is not None for *_, mask in calls) == 2 * training
    expected = run_slowly(backbone, head, images)
    assert 0.05 < (expected[0][1] > 0).double().mean() < 0.95  # masks that hide something and show something
    found = [(part.class_logits, part.mask_logits) for part in (*outputs.aux, outputs)]
    weights = [torch.randn_like(part) for part in sum(expected, ())]
    trained = [parameter for part in (backbone, head) for parameter in part.parameters() if parameter.requires_grad]
    slopes = []
    for results in (found, expected):
        total = sum((part * weight).sum() for part, weight in zip(sum(results, ()), weights, strict=True))
        slopes.append(torch.autograd.grad(total, trained))
    share = 1e-6 if family in FAMILIES else 1e-10  # transformers' own softmax is in float32
    for one, other in zip([*sum(found, ()), *slopes[0]], [*sum(expected, ()), *slopes[1]], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=share * max(1, other.abs().max().item()))
