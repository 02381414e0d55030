import math
import re

import pytest
import torch
from mistakes import refusals
from omegaconf import OmegaConf
from small_trainings import segmenter
from test_matrix import HEADS
from tiny_parts import BACKBONES, SMALL_HEADS, load, load_option, tiny_node
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dinoseg.config.nodes import instantiate
from dinoseg.experiment.builder import Builder
from dinoseg.models.adapters import Full, Lora
from dinoseg.models.backbones.rgb import RgbBackbone
from dinoseg.models.backbones.timm_backbone import TimmBackbone
from dinoseg.models.heads.linear import LinearHead
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


def smallest():
    return SegmentationModel(RgbBackbone(), LinearHead(3, 1, 2))


def rates(groups):
    return {name: (group["lr"], group["weight_decay"]) for group in groups for name in group["names"]}


def test_rates_and_decay_by_place():
    model = segmenter()
    groups = parameter_groups(model, lr=1.0, weight_decay=0.1, backbone_lr_scale=0.2, layer_decay=0.5)
    # each trainable parameter is in exactly one group
    names = [name for group in groups for name in group["names"]]
    assert sorted(names) == sorted(name for name, p in model.named_parameters() if p.requires_grad)
    parameters = [id(p) for group in groups for p in group["params"]]
    assert len(set(parameters)) == len(parameters) == len(names)
    found = rates(groups)
    assert found["head.classify.weight"] == (1.0, 0.1)
    assert found["head.classify.bias"] == found["head.norm.weight"] == (1.0, 0.0)
    last = next(name for name in found if ".layer.1." in name and name.endswith("q_proj.weight"))
    assert found[last] == (pytest.approx(0.2 * 0.5), 0.1)
    assert found[last.replace(".layer.1.", ".layer.0.")] == (pytest.approx(0.2 * 0.25), 0.1)
    assert found["backbone.model.embeddings.patch_embeddings.weight"] == (pytest.approx(0.2 * 0.125), 0.1)
    assert found["backbone.model.embeddings.cls_token"] == (pytest.approx(0.2 * 0.125), 0.0)
    assert found["backbone.model.norm.weight"] == (0.2, 0.0)


QUICK = ("dinov3", "convnext", "timm_vit")  # one of each class


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.heavy]) for name in BACKBONES]
)
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


def test_lora_matrices_are_found():
    model = segmenter(adapter=lambda: Lora(rank=2, alpha=2))
    found = rates(parameter_groups(model, lr=1.0, weight_decay=0.1, backbone_lr_scale=0.5))
    assert all(value == (0.5, 0.1) for name, value in found.items() if ".lora_" in name)
    assert sum(".lora_" in name for name in found) == 16


def test_warmup_is_a_share_of_the_length_or_whole_steps():
    for steps, rise in ((50, 5), (2000, 200), (3, 0)):
        values = [schedule("constant", warmup=0.1)(step, steps) for step in range(steps)]
        assert values == pytest.approx([(step + 1) / (rise + 1) for step in range(rise)] + [1.0] * (steps - rise))
    found = [schedule("constant", warmup=4)(step, 9) for step in range(6)]
    assert found == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert schedule("cosine", warmup=4)(7, 20) == 0.5 * (1 + math.cos(math.pi * 3 / 16))
    assert math.isfinite(schedule("cosine", warmup=10)(3, 5))


SHARE = "give a share of the steps from 0 to below 1"
test_message_names_value_and_remedy = refusals(
    {
        "a warm-up of all steps": (lambda: schedule(warmup=1.0), f"schedule.warmup=1.0: {SHARE}"),
        "half a step": (lambda: schedule(backbone_warmup=50.5), f"schedule.backbone_warmup=50.5: {SHARE}"),
        "no learning rate": (lambda: adamw(segmenter()), "lr is not set"),
        "a decay to 0": (lambda: schedule("exponential"), "min_lr_ratio=0: ", "never reaches 0. Give the final share"),
    }
)


def test_a_warmup_that_leaves_less_than_a_fifth_is_reported(caplog):
    for given in ((50, 0.1, 0), (50, 0, 0), (1, 0, 0), (3, 0.05, 0), (100, 80, 0), (100, 5, 75)):
        warn_of_long_warmup(*given)
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


def test_head_and_backbone_have_own_rates_unless_one_is_set():
    model = segmenter()

    def find_rates(**given):
        optimizer = adamw(model, weight_decay=0.0, **given)
        return {(name.split(".")[0], group["base_lr"]) for group in optimizer.param_groups for name in group["names"]}

    assert find_rates(head_lr=0.5, backbone_lr=0.25) == {("head", 0.5), ("backbone", 0.25)}
    assert find_rates(head_lr=0.5, backbone_lr=0.25, backbone_lr_scale=0.5) == {("head", 0.5), ("backbone", 0.125)}
    assert find_rates(lr=1.0, head_lr=0.5, backbone_lr=0.25) == {("head", 1.0), ("backbone", 1.0)}
    assert find_rates(lr=1.0, backbone_lr_scale=0.5) == {("head", 1.0), ("backbone", 0.5)}


def test_delayed_modules_start_at_zero_and_warm_up_linearly(monkeypatch):
    model = smallest()
    late = model.head.norm
    monkeypatch.setattr(type(model.head), "delayed_modules", (0.3, [late]))
    optimizer = adamw(model, lr=0.5, weight_decay=0.1)
    names = {name for group in optimizer.param_groups if group["frozen_until"] for name in group["names"]}
    assert names == {"head.norm.weight", "head.norm.bias"}
    for step, risen in ((0, 0.0), (6, 0.0), (7, 0.5), (8, 1.0), (18, 1.0)):
        assert set_learning_rates(optimizer, lambda *_: 0.1, step, 20) == pytest.approx(0.05)
        (rate,) = {group["lr"] for group in optimizer.param_groups if group["frozen_until"]}
        assert rate == pytest.approx(0.05 * risen)
        assert {group["lr"] for group in optimizer.param_groups if not group["frozen_until"]} == {0.05}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))


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


def test_adamw_is_fused():
    assert adamw(smallest(), lr=1.0).defaults["fused"]


# by timm model: names of its own parameters that are neither weights nor biases, and of the linear layers and
# convolutions that timm's `no_weight_decay` exempts
EXEMPT = {
    "swin_tiny_patch4_window7_224": ({"relative_position_bias_table"}, ""),
    "swinv2_tiny_window8_256": ({"logit_scale", "q_bias", "v_bias"}, "cpb_mlp"),
    "samvit_base_patch16": ({"pos_embed", "rel_pos_h", "rel_pos_w"}, ""),
    "tiny_vit_5m_224": ({"attention_biases"}, ""),
    "fastvit_t8": ({"gamma"}, ""),
    "xcit_nano_12_p16_224": ({"gamma1", "gamma2", "gamma3", "temperature"}, "pos_embed"),
}


def decay_of(model):
    return {name: decay for name, (_, decay) in rates(parameter_groups(model, lr=1.0, weight_decay=0.1)).items()}


def leaf_names(model):
    """Yield each trained parameter with its name, its module and its name within it."""
    for name, parameter in model.named_parameters():
        module, _, leaf = name.rpartition(".")
        if parameter.requires_grad:
            yield name, model.get_submodule(module), leaf, parameter


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.heavy] if name.startswith(("swin_", "samvit")) else []) for name in EXEMPT],
)
def test_weight_decay_of_timm_models_is_by_meaning(name):
    """Weights of convolutions and linear layers are decayed; norms, positions, scales and temperatures are not."""
    backbone = Full()(TimmBackbone(name, "random", None))
    own, exempt = EXEMPT[name]
    model = SegmentationModel(backbone, LinearHead(backbone.dim, 1, 2))
    found = decay_of(model)
    assert {leaf for _, _, leaf, _ in leaf_names(model)} - {"weight", "bias"} == own
    for full, module, leaf, parameter in leaf_names(model):
        is_norm = "Norm" in type(module).__name__
        decays = leaf == "weight" and not is_norm and not (exempt and f".{exempt}." in full)
        assert found[full] == (0.1 if decays else 0.0), (full, tuple(parameter.shape))
    assert not exempt or any(f".{exempt}." in full and leaf == "weight" for full, _, leaf, _ in leaf_names(model))


SLOTS = {"num_slots": 3, "slot_dim": 16, "hidden_dim": 32, "decoder_dim": 24, "positions_grid": [4, 4]}
SLOT_HEADS = {
    "slots": {"predictor": "savi", "decoder": "mlp"},
    "slot_contrast": {"slot_init": "learned", "predictor": "transformer", "token_mlp": True},
    "videosaur": {"decoder": "slot_mixer", "positions": "added", "mixer_blocks": 1, "similarity": True},
}


@pytest.mark.parametrize("head", [*HEADS, *SLOT_HEADS])
def test_weight_decay_of_heads_is_by_meaning(head):
    vectors = (
        r"queries|query_\w+|level_\w+|learned_slots|mean|log_variance|table|\w*tokens?|position_embeddings|lambda1"
        r"|scales\.\d+|scale\d"
    )
    small = SLOTS | SLOT_HEADS[head] if head in SLOT_HEADS else SMALL_HEADS.get(head, {})
    node = {**load_option("head", "slots" if head in SLOT_HEADS else head), **small}
    parts = {"adapter": load("adapter=full")["adapter"], "backbone": tiny_node("dinov2"), "head": node}
    model = Builder(OmegaConf.create({**load(), **parts})).model()
    found = decay_of(model)
    for name, module, leaf, _ in leaf_names(model):
        is_exempt = "Norm" in type(module).__name__ or "bias" in leaf or re.search(rf"\.({vectors})(\.weight)?$", name)
        assert found[name] == (0.0 if is_exempt else 0.1), name


@pytest.mark.parametrize("module", [nn.LayerNorm((3, 4)), nn.RMSNorm((3, 4)), nn.Embedding(3, 4)])
def test_norms_and_embeddings_of_two_axes_are_not_decayed(module):
    model = smallest()
    model.head.part = module
    found = decay_of(model)
    assert module.weight.ndim == 2 and found["head.part.weight"] == 0.0 and found["head.classify.weight"] == 0.1
