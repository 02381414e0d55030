"""The head of the Plain Mask Transformer, against a plain reference, numbers of the official code, and its files."""

import math
import zlib
from functools import partial
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from eomt_making import FAMILIES, spy_on_attention
from mistakes import refusals

from dinoseg.core.contracts import Backbone
from dinoseg.extensions.query_heads import pmt
from dinoseg.extensions.query_heads.eomt import annealing_windows
from dinoseg.extensions.query_heads.pmt import PmtHead, even_windows, load_decoder, official_name, rotary_positions
from dinoseg.models.adapters import Frozen, Full
from dinoseg.models.backbones.timm_backbone import TimmBackbone
from dinoseg.models.backbones.transformers_vit import TransformersVit
from dinoseg.models.model import SegmentationModel

LAYERS = [0, 2]
SMALL = {"patch_size": 16, "blocks": 2, "num_queries": 5}
FOUR = {"patch_size": 16, "blocks": 2, "num_queries": 3}  # of the numbers of the official code


def make_pair(family="dinov3_vit", adapter=None, **options):
    torch.manual_seed(0)
    if family == "timm":
        backbone = TimmBackbone("test_vit", "random", None, [0, 1])
        patch = 16
    else:
        arch, patch = FAMILIES[family]
        backbone = TransformersVit(family, arch, "random", patch, LAYERS)
    head = PmtHead(backbone.dim, 2, 4, **{**SMALL, "patch_size": patch, **options})
    with torch.no_grad():
        for part in (*head.decoder.parameters(), *head.scales, *head.norms.parameters()):
            part.add_(torch.randn_like(part) / 5)  # no factor is one, no shift is zero
    for norm in head.norms:
        norm.running_mean.normal_(std=0.3)
        norm.running_var.uniform_(0.5, 2)
    return (adapter or Frozen())(backbone), head


def attend_slowly(block, tokens, cos, sin, hidden):
    """Return the result of a block's attention, head by head; `hidden` (B, N, N), True = not attended."""
    normed = F.layer_norm(tokens, tokens.shape[-1:], block.norm1.weight, block.norm1.bias)
    query, value = (F.linear(normed, part.weight, part.bias) for part in (block.q_proj, block.v_proj))
    key = normed @ block.k_proj.weight.T
    width = cos.shape[1]
    count = len(cos)
    turn = torch.complex(cos, sin)[:, : width // 2]  # of a pair of channels
    found = []
    for first in range(0, tokens.shape[-1], width):
        rows = []
        for part in (query, key):
            mine = part[..., first : first + width]
            pairs = torch.complex(mine[..., : width // 2], mine[..., width // 2 :])
            turned = torch.cat([pairs[:, :-count], pairs[:, -count:] * turn], dim=1)
            rows.append(torch.cat([turned.real, turned.imag], dim=-1))
        scores = (rows[0] @ rows[1].mT / math.sqrt(width)).masked_fill(hidden, -math.inf)
        found.append(scores.softmax(-1) @ value[..., first : first + width])
    return block.o_proj(torch.cat(found, dim=-1))


def read_slowly(head, tokens, grid):
    normed = F.layer_norm(tokens, tokens.shape[-1:], head.decoder_norm.weight, head.decoder_norm.bias)
    queries = normed[:, : len(head.queries)]
    patches = head.upscale(normed[:, -grid[0] * grid[1] :].mT.reshape(len(tokens), -1, *grid))
    masks = (head.mask_embed(queries) @ patches.flatten(2)).unflatten(2, patches.shape[2:])
    return head.classify(queries), masks


def run_slowly(head, tokens, grid, positions):
    """Return class and mask logits of each block's input and of the end, with dense attention masks in training."""
    total = 0
    for part, norm, lateral, scale in zip(tokens, head.norms, head.laterals, head.scales, strict=True):
        rows = part.flatten(0, 1)
        mean, variance = (rows.mean(0), rows.var(0, correction=0)) if head.training else (None, None)
        if not head.training:
            mean, variance = norm.running_mean, norm.running_var
        normed = (part - mean) / (variance + 1e-5).sqrt() * norm.weight + norm.bias
        total = total + (normed + lateral[2](F.gelu(lateral[0](normed)))) * scale
    x = torch.cat([head.queries.expand(len(total), -1, -1), total], dim=1)
    found = []
    for block in head.decoder:
        hidden = torch.zeros(len(x), x.shape[1], x.shape[1], dtype=torch.bool)
        if head.training:
            found.append(read_slowly(head, x, grid))
            outside = F.interpolate(found[-1][1], grid, mode="bilinear").flatten(2) <= 0
            hidden[:, : len(head.queries), -grid[0] * grid[1] :] = outside
        x = x + attend_slowly(block, x, *positions, hidden) * block.scale1
        normed = F.layer_norm(x, x.shape[-1:], block.norm2.weight, block.norm2.bias)
        x = x + block.down_proj(F.gelu(block.up_proj(normed))) * block.scale2
    return [*found, read_slowly(head, x, grid)]


def write_positions(grid, head_dim):
    """Return the cosines and sines of a grid, written out patch by patch."""
    quarter = head_dim // 4
    angles = []
    for row in range(grid[0]):
        for column in range(grid[1]):
            places = 2 * (row + 0.5) / grid[0] - 1, 2 * (column + 0.5) / grid[1] - 1
            angles.append([2 * math.pi * place * 100 ** (-n / quarter) for place in places for n in range(quarter)] * 2)
    return torch.tensor(angles).cos(), torch.tensor(angles).sin()


@pytest.mark.parametrize(("grid", "head_dim"), [((1, 1), 4), ((3, 5), 8), ((7, 2), 64)])
def test_own_positions_are_those_of_dinov3(grid, head_dim):
    found = rotary_positions(grid, head_dim, torch.zeros(1), rescale=None)
    for part, expected in zip(found, write_positions(grid, head_dim), strict=True):
        torch.testing.assert_close(part, expected, atol=2e-6, rtol=0)


def test_own_positions_are_rescaled_in_training_only(monkeypatch):
    backbone, head = make_pair("vit")
    spy = Mock(side_effect=rotary_positions)
    monkeypatch.setattr(pmt, "rotary_positions", spy)
    images = torch.rand(1, 3, 48, 32)
    head.eval().run(backbone, images)
    head.train().run(backbone, images)
    assert [call.kwargs["rescale"] for call in spy.call_args_list] == [None, 2.0]
    factors = []
    for _ in range(200):
        sin = rotary_positions((1, 64), 4, torch.zeros(1), rescale=2.0)[1]
        factors.append(sin[32, 1].item() * 64 / (2 * math.pi))  # nearly the angle, at the column 1 / 64
    assert 0.49 < min(factors) < 0.6 and 1.7 < max(factors) < 2.01
    spy.reset_mock()
    make_pair("dinov3_vit")[1].run(make_pair("dinov3_vit")[0], images)
    assert not spy.called  # the backbone has positions


@pytest.mark.parametrize("size", [(1, 1), (45, 61), (96, 32)])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("family", ["vit", "dinov2", "dinov3_vit", "timm"])
def test_outputs_and_gradients_equal_a_plain_reference(family, training, size, monkeypatch):
    monkeypatch.setattr(pmt, "_RESCALE", None)
    backbone, head = (part.double().train(training) for part in make_pair(family))
    backbone.eval()
    images = torch.rand(3, 3, *size, dtype=torch.float64)
    frozen = head.forward_frozen(backbone, images)
    grid = tuple(-(-side // backbone.patch_size) for side in size)
    assert [tuple(part.shape) for part in frozen] == [(3, backbone.num_prefix + grid[0] * grid[1], backbone.dim)] * 2
    own = rotary_positions(grid, backbone.head_dim, images, rescale=None)
    positions = backbone.block_kwargs(size).get("position_embeddings", own)
    expected = run_slowly(head, frozen, grid, [part.double() for part in positions])
    outputs = head.run(backbone, images)
    found = [(one.class_logits, one.mask_logits) for one in (*outputs.aux, outputs)]
    assert len(found) == len(expected) == 1 + 2 * training
    slopes = []
    weights = [tuple(torch.randn_like(part) for part in parts) for parts in expected]
    for results in (found, expected):
        pairs = zip(sum(results, ()), sum(weights, ()), strict=True)
        total = sum((part * weight).sum() for part, weight in pairs)
        slopes.append(torch.autograd.grad(total, list(head.parameters())))
    for one, other in zip([*sum(found, ()), *slopes[0]], [*sum(expected, ()), *slopes[1]], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9 * other.abs().max().item())


@pytest.mark.parametrize("family", ["dinov3_vit", "timm"])
def test_tokens_hold_the_maps_after_class_and_register_tokens(family):
    backbone, _ = make_pair(family)
    images = torch.rand(2, 3, 37, 50)
    block_kwargs = backbone.eval().block_kwargs((37, 50))
    tokens = backbone.trainable_tokens(backbone.forward_frozen(images), block_kwargs)
    for part, expected in zip(tokens, backbone(images), strict=True):
        found = part[:, -12:].mT.unflatten(2, (3, 4))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert block_kwargs.keys() == ({"position_embeddings"} if family == "dinov3_vit" else set())


@pytest.mark.parametrize("blocks", [1, 2, 6])
def test_masks_are_used_in_training_until_they_are_annealed(blocks, monkeypatch):
    backbone, head = make_pair(blocks=blocks)
    calls = spy_on_attention(monkeypatch)
    images = torch.rand(2, 3, 48, 64)
    for progress, masked in ((0, blocks), (0.16, blocks - 1), (0.84, 0)):
        calls.clear()
        head.train().set_progress(round(1000 * progress), 1000)
        assert len(head.run(backbone.eval(), images).aux) == blocks
        shapes = [tuple(mask.shape) for *_, mask in calls if mask is not None]
        assert shapes == [(2, 1, 5, 5 + 5 + 12)] * masked
    head.eval().set_progress(0, 1000)
    calls.clear()
    assert head.run(backbone, images).aux == [] and all(mask is None for *_, mask in calls)


def test_even_windows_are_the_published_ones():
    published = {  # tue-mps/pmt, image/configs/ade20k and coco: steps, starts, ends
        16 * 1262: ([0, 5384, 7403, 9422, 11442, 13461], [3000, 8749, 10769, 12788, 14807, 16826]),
        12 * 7391: ([0, 23651, 32520, 41389, 50258, 59128], [3000, 38433, 47302, 56171, 65040, 73910]),
    }
    for steps, (starts, ends) in published.items():
        for number, (start, end) in enumerate(annealing_windows(even_windows(6), 6)):
            assert abs(start * steps - starts[number]) <= 25
            assert abs(end * steps - ends[number]) <= 25 or number == 0
    assert make_pair(blocks=3)[1].windows == even_windows(3)


def noise(name, *shape):
    """Return numbers in -1..1 that depend on the name alone: the same on every machine."""
    steps = torch.arange(math.prod(shape), dtype=torch.float64) + zlib.crc32(name.encode()) % 10007
    return ((steps * 12.9898).sin() * 43758.5453).frac().view(shape)


def make_weight(name, shape):
    if not shape:
        return torch.tensor(7)
    if len(shape) > 1:
        return noise(name, *shape) * (1.5 if name.endswith("q.weight") else math.sqrt(3 / math.prod(shape[1:])))
    return noise(name, *shape) / 5 + (name.endswith(("weight", "running_var", "lambda1")) or "scalers" in name)


def make_file(head, **others):
    names = [official_name(name) for name in head.state_dict()]
    made = {name: make_weight(name, value.shape) for name, value in zip(names, head.state_dict().values(), strict=True)}
    return {"state_dict": {**made, "network.decoder.attn_mask_probs": torch.ones(2), **others}}


# Of the official code (tue-mps/pmt at 54d73c9, image/models), run once in float64 outside the project, with the weights
# and tokens of `noise`: per prediction, before each block and at the end, two class logits and four mask logits
OFFICIAL = {
    "train": [
        [-3.1649127438, -0.4843729714, 2.3668758281, 3.1494757462, 2.8512061126, -1.034023982],
        [0.0352046817, -0.6886045751, -1.1743967887, 0.8423022304, 1.6163737335, 0.3998915612],
        [-0.8876333757, -0.1970366923, -0.5328718924, 0.2481938272, 1.2713539907, -0.1205561509],
    ],
    "eval": [[-0.8647263047, -0.2180146355, -0.6690310579, 0.1000616123, 1.1385423201, -0.0115529106]],
}


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_numbers_are_those_of_the_official_code(tmp_path, mode):
    torch.save(make_file(PmtHead(32, 4, 4, **FOUR)), tmp_path / "made.pth")
    head = PmtHead(32, 4, 4, **FOUR, weights=str(tmp_path / "made.pth")).double()
    torch.save(make_file(head), tmp_path / "made.pth")
    load_decoder(head, str(tmp_path / "made.pth"), new_class_layer=False)  # in float64
    head.train(mode == "train")
    outputs = head.forward_trainable(*make_tokens(), (48, 64))
    found = [
        torch.cat([one.class_logits[1, 2, :2], one.mask_logits[0, :, 5, 7], one.mask_logits[1, 1, 11, 3:4]])
        for one in (*outputs.aux, outputs)
    ]
    torch.testing.assert_close(torch.stack(found), torch.tensor(OFFICIAL[mode], dtype=torch.float64), rtol=0, atol=1e-8)


def make_tokens():
    """Return a backbone of tokens alone, and the tokens (2, 5 + 12, 32) of four blocks."""
    positions = tuple(part.double() for part in write_positions((3, 4), 8))
    tokens = [noise(f"tokens {number}", 2, 17, 32) * 1.7 for number in range(4)]
    backbone = SimpleNamespace(
        grid=lambda _: (3, 4),
        block_kwargs=lambda _: {"position_embeddings": positions},
        trainable_tokens=lambda frozen, _: frozen,
    )
    return backbone, tokens


def test_released_files_with_backbone_or_compiled_names_load(tmp_path):
    head = PmtHead(32, 4, 4, **FOUR)
    wanted = make_file(head)["state_dict"]
    content = make_file(head, **{"network.encoder.backbone.norm.weight": torch.ones(3), "criterion.empty_weight": 0})
    compiled = {name.replace("decoder.", "decoder._orig_mod."): value for name, value in wanted.items()}
    for number, given in enumerate((content, wanted, compiled)):
        torch.save(given, tmp_path / f"{number}.bin")
        loaded = PmtHead(32, 4, 4, **FOUR, weights=str(tmp_path / f"{number}.bin")).state_dict()
        for name, value in loaded.items():
            torch.testing.assert_close(value, wanted[official_name(name)].to(value.dtype), rtol=0, atol=0)


def test_new_class_layer_fits_other_classes(tmp_path):
    torch.save(make_file(PmtHead(32, 4, 9, **FOUR)), tmp_path / "made.pth")
    head = PmtHead(32, 4, 2, **FOUR, weights=str(tmp_path / "made.pth"), class_layer="new")
    assert head.classify.weight.shape == (3, 32) and head.classify.weight.abs().max() < 1
    expected = make_weight("network.decoder.q.weight", (3, 32)).float()
    torch.testing.assert_close(head.queries.detach(), expected, rtol=0, atol=0)


def load_changed(change, **options):
    content = make_file(PmtHead(32, 4, 4, **FOUR))
    change(content["state_dict"])
    torch.save(content, "made.pth")
    PmtHead(32, 4, 4, **{**FOUR, **options}, weights="made.pth")


def put(name, value):
    return lambda content: content.update({name: value})


Q = "network.decoder.q.weight"
test_files_that_do_not_fit_are_refused = refusals(
    {
        "missing": (
            partial(load_changed, lambda content: content.pop(Q)),
            *("weights=made.pth: 1 tensor missing (network.decoder.q.weight)", "Give the decoder of PMT"),
        ),
        "fewer blocks": (
            partial(load_changed, dict, blocks=1),
            *("17 tensors left over (network.decoder.blocks.1.", "set head.blocks"),
        ),
        "more queries": (
            partial(load_changed, dict, num_queries=7),
            "weights=made.pth: ",
            "[3, 32] instead of [7, 32]",
        ),
        "not finite": (partial(load_changed, put(Q, torch.full((3, 32), math.nan))), "NaN"),
        "a list": (partial(load_changed, put(Q, [1.0])), Q),
        "a number as name": (
            partial(load_changed, lambda content: content.update({1: content.pop(Q)})),
            "1 tensor missing",
        ),
        "no file": (lambda: PmtHead(32, 4, 4, **FOUR, weights="none.pth"), "none.pth"),
        "nothing to replace": (
            lambda: PmtHead(32, 4, 4, **FOUR, class_layer="new"),
            *("class_layer=new without weights", "weights=FILE"),
        ),
        "widths of a pyramid": (lambda: PmtHead([96, 192], 2, 4, **FOUR), "EoMT and PMT need", "dinov3_vit", "dpt"),
        "another anneal": (lambda: PmtHead(32, 4, 4, **FOUR, anneal="odd"), "anneal=odd: give even"),
        "heads that do not divide the width": (
            lambda: make_pair("timm")[1].check_backbone(SimpleNamespace(has_tokens=True, blocks=[], head_dim=48)),
            *("head_dim=48", "width of 64", "SimpleNamespace", "eomt"),
        ),
        "maps alone": (lambda: SegmentationModel(Backbone(), make_pair()[1]), "EoMT and PMT need", "vit_small"),
    }
)


def test_full_training_reaches_every_parameter():
    backbone, head = make_pair(adapter=Full())
    model = SegmentationModel(backbone, head).train()
    outputs = model(torch.rand(2, 3, 40, 40)).outputs
    sum(
        one.class_logits.square().mean() + one.mask_logits.square().mean() for one in (*outputs.aux, outputs)
    ).backward()
    unreached = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert unreached == {f"backbone.{name}" for name in backbone.unused}


def test_frozen_backbone_gets_no_gradient_and_stays_in_eval_mode():
    model = SegmentationModel(*make_pair()).train()
    model(torch.rand(2, 3, 40, 40)).scores().sum().backward()
    assert not any(part.training for part in model.backbone.modules())
    assert all(parameter.grad is None for parameter in model.backbone.parameters())
