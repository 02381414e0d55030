import math

import pytest
import torch
from omegaconf import OmegaConf
from tiny_parts import BACKBONES, tiny_node
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dinoseg.config.nodes import instantiate
from dinoseg.models.adapters import Full, Lora
from dinoseg.models.backbones.rgb import RgbBackbone
from dinoseg.models.backbones.transformers_vit import TransformersVit
from dinoseg.models.heads.eomt import EomtHead
from dinoseg.models.heads.linear import LinearHead
from dinoseg.models.heads.mask2former.head import Mask2FormerHead
from dinoseg.models.model import SegmentationModel
from dinoseg.training.optim import (
    MovingAverage,
    adamw,
    parameter_groups,
    scale_gradients,
    schedule,
    set_learning_rates,
    warn_of_long_warmup,
)
from dinoseg.utils.errors import UserError


def smallest():
    return SegmentationModel(RgbBackbone(), LinearHead(3, 1, 2))


def rates(groups):
    return {name: (group["lr"], group["weight_decay"]) for group in groups for name in group["names"]}


def test_each_trainable_parameter_is_in_exactly_one_group(tiny_backbone):
    model = SegmentationModel(Full()(tiny_backbone()), LinearHead(24, 1, 3))
    groups = parameter_groups(model, lr=1.0, weight_decay=0.1, layer_decay=0.5)
    names = [name for group in groups for name in group["names"]]
    assert sorted(names) == sorted(name for name, p in model.named_parameters() if p.requires_grad)
    parameters = [id(p) for group in groups for p in group["params"]]
    assert len(set(parameters)) == len(parameters) == len(names)


def test_rates_and_decay_by_place(tiny_backbone):
    model = SegmentationModel(Full()(tiny_backbone()), LinearHead(24, 1, 3))
    found = rates(parameter_groups(model, lr=1.0, weight_decay=0.1, backbone_lr_scale=0.2, layer_decay=0.5))
    assert found["head.classify.weight"] == (1.0, 0.1)
    assert found["head.classify.bias"] == found["head.norm.weight"] == (1.0, 0.0)
    last = next(name for name in found if ".layer.1." in name and name.endswith("q_proj.weight"))
    assert found[last] == (pytest.approx(0.2 * 0.5), 0.1)
    assert found[last.replace(".layer.1.", ".layer.0.")] == (pytest.approx(0.2 * 0.25), 0.1)
    assert found["backbone.model.embeddings.patch_embeddings.weight"] == (pytest.approx(0.2 * 0.125), 0.1)
    assert found["backbone.model.embeddings.cls_token"] == (pytest.approx(0.2 * 0.125), 0.0)
    assert found["backbone.model.norm.weight"] == (0.2, 0.0)


@pytest.mark.parametrize("name", BACKBONES)
def test_rates_rise_from_the_image_to_the_head(name):
    small = {"arch": {"depths": [1, 2, 6, 1]}} if name == "convnext" else {}  # more blocks in a stage than stages
    backbone = instantiate(OmegaConf.to_container(OmegaConf.merge(tiny_node(name), {"layers": [-1]}, small)))
    model = SegmentationModel(Full()(backbone), LinearHead(backbone.dim, 1, 2))
    found = rates(parameter_groups(model, lr=1.0, weight_decay=0.1, layer_decay=0.5))
    assert max(rate for rate, _ in found.values()) == 1.0
    by_id = {id(parameter): found[name][0] for name, parameter in model.named_parameters() if name in found}
    blocks = list(backbone.blocks)
    for number, block in enumerate(blocks):
        inside = {by_id[id(parameter)] for parameter in block.parameters()}
        assert inside == {0.5 ** (len(blocks) - number)}
        for parameter in block.parameters():
            by_id.pop(id(parameter))
    lowest = 0.5 ** (len(blocks) + 1)
    ends = {name for name, parameter in model.named_parameters() if by_id.get(id(parameter)) == 1.0}
    assert all(name.startswith("head.") or "norm" in name for name in ends) and len(ends) >= 4
    assert all(rate == lowest for rate in by_id.values() if rate != 1.0)


def test_embeddings_are_not_decayed():
    small = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "mlp_ratio": 1, "image_size": 28}
    backbone = TransformersVit("dinov2", small, "random", 14, layers=(0, 0, 1, 1))
    for head in (
        Mask2FormerHead(64, 4, 2, hidden_dim=64, num_queries=5, feedforward_dim=32),
        EomtHead(64, 4, 2, patch_size=14, num_queries=5, blocks=1),
    ):
        found = rates(parameter_groups(SegmentationModel(Full()(backbone), head), lr=1.0, weight_decay=0.1))
        decayed = {name for name, (_, decay) in found.items() if decay}
        free = ("query_feat", "query_embed", "level_embed", "level_encoding", "queries", "position_embeddings", "token")
        assert any("q_proj" in name for name in decayed) and any(name.startswith("head.") for name in decayed)
        assert not [name for name in decayed if any(part in name for part in free)]
        assert [name for name in found if "quer" in name]


def test_lora_matrices_are_found(tiny_backbone):
    model = SegmentationModel(Lora(rank=2, alpha=2)(tiny_backbone()), LinearHead(24, 1, 3))
    found = rates(parameter_groups(model, lr=1.0, weight_decay=0.1, backbone_lr_scale=0.5))
    assert all(value == (0.5, 0.1) for name, value in found.items() if ".lora_" in name)
    assert sum(".lora_" in name for name in found) == 16


@pytest.mark.parametrize("kind", ["constant", "cosine", "poly", "exponential"])
@pytest.mark.parametrize("warmup", [0, 5])
def test_schedules_rise_then_fall_to_their_floor(kind, warmup):
    factor = schedule(kind, warmup=warmup, min_lr_ratio=0.1, power=0.9)
    values = [factor(step, 50) for step in range(51)]
    assert values[warmup] == pytest.approx(1.0)
    assert values[:warmup] == sorted(values[:warmup]) and all(0 < value < 1 for value in values[:warmup])
    assert values[warmup:] == sorted(values[warmup:], reverse=True)
    assert values[-1] == pytest.approx(1.0 if kind == "constant" else 0.1)


def test_schedule_formulas_at_the_middle():
    assert schedule("cosine")(25, 50) == pytest.approx(0.5)
    assert schedule("poly", power=2.0)(25, 50) == pytest.approx(0.25)
    assert schedule("exponential", min_lr_ratio=0.25)(25, 50) == pytest.approx(0.5)
    assert schedule("cosine")(0, 1) == 1.0


def test_warmup_is_a_share_of_the_length():
    for steps, rise in ((50, 5), (2000, 200), (3, 0)):
        values = [schedule("constant", warmup=0.1)(step, steps) for step in range(steps)]
        assert values == pytest.approx([(step + 1) / (rise + 1) for step in range(rise)] + [1.0] * (steps - rise))


def test_a_whole_warmup_is_a_number_of_steps():
    found = [schedule("constant", warmup=4)(step, 9) for step in range(6)]
    assert found == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert schedule("cosine", warmup=4)(7, 20) == 0.5 * (1 + math.cos(math.pi * 3 / 16))


@pytest.mark.parametrize("warmup", [1.0, 50.5])
def test_warmup_that_is_neither_share_nor_steps_is_refused(warmup):
    for key in ("warmup", "backbone_warmup"):
        with pytest.raises(UserError, match=f"schedule.{key}={warmup}: give a share of the steps from 0 to below 1"):
            schedule(**{key: warmup})


def test_a_warmup_that_leaves_less_than_a_fifth_is_reported(caplog):
    for steps, warmup, backbone_warmup in (
        (50, 0.1, 0),
        (50, 0, 0),
        (1, 0, 0),
        (3, 0.05, 0),
        (100, 80, 0),
        (100, 5, 75),
    ):
        warn_of_long_warmup(steps, warmup, backbone_warmup)
    assert not caplog.messages
    warn_of_long_warmup(50, 2000)
    assert "rises for 2000 steps of a training of 50" in caplog.text
    assert "Set optim.schedule.warmup to a share of the length, such as 0.1, or more trainer.steps" in caplog.text
    caplog.clear()
    warn_of_long_warmup(100, 0.81)
    assert "rises for 81 steps" in caplog.text
    caplog.clear()
    warn_of_long_warmup(100, 5, 76)
    assert "rises for 81 steps" in caplog.text and "Set optim.schedule.backbone_warmup to" in caplog.text


def test_head_and_backbone_have_own_rates_unless_one_is_set(tiny_backbone):
    model = SegmentationModel(Full()(tiny_backbone()), LinearHead(24, 1, 3))

    def find_rates(**given):
        optimizer = adamw(model, weight_decay=0.0, **given)
        return {(name.split(".")[0], group["base_lr"]) for group in optimizer.param_groups for name in group["names"]}

    assert find_rates(head_lr=0.5, backbone_lr=0.25) == {("head", 0.5), ("backbone", 0.25)}
    assert find_rates(head_lr=0.5, backbone_lr=0.25, backbone_lr_scale=0.5) == {("head", 0.5), ("backbone", 0.125)}
    assert find_rates(lr=1.0, head_lr=0.5, backbone_lr=0.25) == {("head", 1.0), ("backbone", 1.0)}
    assert find_rates(lr=1.0, backbone_lr_scale=0.5) == {("head", 1.0), ("backbone", 0.5)}
    with pytest.raises(UserError, match="lr is not set"):
        adamw(model)


def test_set_learning_rates_scales_every_group():
    optimizer = adamw(smallest(), lr=0.5, weight_decay=0.1)
    assert set_learning_rates(optimizer, lambda *_: 0.1, 0, 1) == pytest.approx(0.05)
    assert {group["lr"] for group in optimizer.param_groups} == {0.05}
    set_learning_rates(optimizer, lambda *_: 1.0, 0, 1)
    assert {group["lr"] for group in optimizer.param_groups} == {0.5}


def test_delayed_modules_start_at_zero_and_warm_up_linearly(monkeypatch):
    model = smallest()
    late = model.head.norm
    monkeypatch.setattr(type(model.head), "delayed_modules", (0.3, [late]))
    optimizer = adamw(model, lr=0.5, weight_decay=0.1)
    names = {name for group in optimizer.param_groups if group["start"] for name in group["names"]}
    assert names == {"head.norm.weight", "head.norm.bias"}
    for step, risen in ((0, 0.0), (6, 0.0), (7, 0.5), (8, 1.0), (18, 1.0)):
        assert set_learning_rates(optimizer, lambda *_: 0.1, step, 20) == pytest.approx(0.05)
        (rate,) = {group["lr"] for group in optimizer.param_groups if group["start"]}
        assert rate == pytest.approx(0.05 * risen)
        assert {group["lr"] for group in optimizer.param_groups if not group["start"]} == {0.05}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))


def test_moving_average_follows_its_formula_and_swaps_back():
    weight = nn.Parameter(torch.tensor([1.0, 2.0]))
    average = MovingAverage([("w", weight)], decay=0.9)
    with torch.no_grad():
        weight += 1
    average.update(step=1000)
    torch.testing.assert_close(average.average["w"], torch.tensor([1.1, 2.1]))
    with average.use_average():
        torch.testing.assert_close(weight.data, torch.tensor([1.1, 2.1]))
    torch.testing.assert_close(weight.data, torch.tensor([2.0, 3.0]))


def test_moving_average_forgets_the_initial_weights_soon():
    weight = nn.Parameter(torch.zeros(1))
    average = MovingAverage([("w", weight)], decay=0.999)
    with torch.no_grad():
        weight += 1
    for step in range(100):
        average.update(step)
    assert average.average["w"].item() > 0.999


class Calls(TorchDispatchMode):
    """Count the operations that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket._qualified_op_name.removeprefix("aten::"))
        return function(*args, **(kwargs or {}))


def ragged_tensors(*, seed=0):
    """Return tensors of two floating dtypes, each dtype with odd shapes, and an integer count."""
    rng = torch.Generator().manual_seed(seed)
    shapes = [(), (1,), (3, 5), (0,), (2, 3, 7), (129,)] * 20
    found = [torch.randn(shape, generator=rng).mul_(10.0 ** (number % 9 - 4)) for number, shape in enumerate(shapes)]
    return [*(value.bfloat16() if number % 4 == 3 else value for number, value in enumerate(found)), torch.tensor(seed)]


def test_gradients_are_scaled_in_one_call_per_dtype():
    parameters = [nn.Parameter(value) for value in ragged_tensors() if value.is_floating_point()]
    for parameter, gradient in zip(parameters, ragged_tensors(seed=1), strict=False):
        parameter.grad = gradient
    parameters.append(nn.Parameter(torch.ones(2)))  # no gradient has reached it
    scale = torch.tensor(1 / 3, dtype=torch.float64)
    expected = [each.grad * scale.to(each.grad.dtype) for each in parameters[:-1]]
    with Calls() as calls:
        scale_gradients(parameters, scale)
    assert all(torch.equal(each.grad, value) for each, value in zip(parameters, expected, strict=False))
    assert parameters[-1].grad is None
    assert calls.names.count("_foreach_mul_") == 2 and "mul_" not in calls.names


def test_moving_average_takes_one_call_per_dtype():
    live = {str(number): value for number, value in enumerate(ragged_tensors())}
    average = MovingAverage(live.items(), decay=0.9)
    expected = {name: value.clone() for name, value in live.items()}
    for step in (0, 7, 1000):
        for value, new in zip(live.values(), ragged_tensors(seed=step + 1), strict=True):
            value.copy_(new)
        share = 1 - min(0.9, (1 + step) / (10 + step))
        for name, value in live.items():
            expected[name].lerp_(value, share) if value.is_floating_point() else expected[name].copy_(value)
        with Calls() as calls:
            average.update(step)
        assert all(torch.equal(average.average[name], value) for name, value in expected.items())
        assert [name for name in calls.names if name != "detach"] == ["_foreach_lerp_"] * 2 + ["_foreach_copy_"]
    before = {name: value.clone() for name, value in live.items()}
    with average.use_average():
        assert all(torch.equal(live[name], value) for name, value in expected.items())
    assert all(torch.equal(live[name], value) for name, value in before.items())


def test_swapping_the_average_copies_one_weight_at_a_time():
    live = {str(size): torch.full((size,), float(size)) for size in (15, 3, 40, 2)}
    average = MovingAverage(live.items(), decay=0.9)
    for value in live.values():
        value += 1
    with Calls() as calls, average.use_average():
        assert all((value == float(name)).all() for name, value in live.items())
    assert all((value == float(name) + 1).all() for name, value in live.items())
    names = " ".join(name for name in calls.names if name in ("clone", "copy_"))
    assert "clone clone" not in names and names.count("clone") == 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_adamw_equals_single_operations(dtype):
    models = [SegmentationModel(RgbBackbone(), LinearHead(3, 1, 2)).to(dtype) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    fused = adamw(models[0], lr=1e-2, weight_decay=0.1)
    plain = torch.optim.AdamW(parameter_groups(models[1], lr=1e-2, weight_decay=0.1), fused=False, foreach=False)
    for step in range(5):
        for one, two in zip(models[0].parameters(), models[1].parameters(), strict=True):
            one.grad = torch.randn(one.shape, generator=torch.Generator().manual_seed(step)).to(dtype)
            two.grad = one.grad.clone()
        with Calls() as calls:
            fused.step()
        plain.step()
        assert "_fused_adamw_" in calls.names
    for one, two in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, two)


def test_other_bad_input_is_refused():
    with pytest.raises(UserError, match="Nothing is trainable"):
        parameter_groups(smallest().requires_grad_(False), lr=1.0, weight_decay=0.0)
    with pytest.raises(UserError, match="min_lr_ratio=0: kind=exponential never reaches 0. Give the final share"):
        schedule("exponential")
    assert math.isfinite(schedule("cosine", warmup=10)(3, 5))
