"""Learning rates and weight decays of published trainings, against the formulas of their code, as written here."""

import math
import re
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from failing import fail_after
from finished_runs import rows, train_run
from making import save
from omegaconf import OmegaConf
from small_trainings import segmenter, values_of
from test_freeze import alike, parts, train
from tiny_parts import load
from torch import nn

from dinoseg.config.nodes import instantiate
from dinoseg.extensions.query_heads.eomt import EomtHead
from dinoseg.losses.cross_entropy import CrossEntropy
from dinoseg.models.adapters import Frozen, Full
from dinoseg.models.backbones.transformers_vit import TransformersVit
from dinoseg.models.heads.linear import LinearHead
from dinoseg.models.model import SegmentationModel
from dinoseg.training.optim import adamw, schedule, set_learning_rates

DINOV2_LINEAR = """
optimizer: {lr: 1.0e-3, weight_decay: 1.0e-4, weight_decay_on: all}
schedule: {kind: poly, power: 1.0, warmup: 1500, warmup_start: 1.0e-6, warmup_decays: true}
"""
DINOV3_LINEAR = """
optimizer: {lr: 1.0e-3, weight_decay: 1.0e-3, weight_decay_on: all}
schedule: {kind: one_cycle, warmup: 1500, warmup_start: 1.0e-6}
"""
EOMT = """
optimizer: {lr: 1.0e-4, weight_decay: 0.05, weight_decay_on: all, layer_decay: 0.8, layer_decay_rule: eomt}
schedule: {kind: poly, power: 0.9, warmup: 500, warmup_start: 0, backbone_warmup: 1000}
"""
EOMT_DINOV3 = """
optimizer: {lr: 2.0e-4, weight_decay: 0.05, weight_decay_on: all, layer_decay: null}
schedule: {kind: poly, power: 0.9, warmup: 2000, warmup_start: 0, backbone_warmup: 3000}
"""
PMT = """
optimizer: {lr: 2.0e-4, weight_decay: 0.05, weight_decay_on: all}
schedule: {kind: cosine, warmup: 6000, warmup_start: 0, min_lr_ratio: 5.0e-6}
"""
SLOTS = """
optimizer: {lr: 4.0e-4, weight_decay: 0.0}
schedule: {kind: exponential, warmup: 2500, warmup_start: 0, min_lr_ratio: 0.5}
"""


def parts_of(recipe):
    """Return the optimizer factory and the schedule of the default config with the keys of a recipe."""
    alone = {"optimizer": {"head_lr": None, "backbone_lr": None}}  # refer to groups that are absent here
    node = OmegaConf.merge(load()["optim"], alone, yaml.safe_load(recipe))
    return instantiate(node.optimizer), instantiate(node.schedule)


def rates_at(optimizer, factor, step, steps):
    """Return (learning rate, weight decay) of each parameter at a step, by name."""
    set_learning_rates(optimizer, factor, step, steps)
    groups = optimizer.param_groups
    return {name: (group["lr"], group["weight_decay"]) for group in groups for name in group["names"]}


def dinov2_linear(i, steps, warmup):
    """mmcv 1.5: the poly decay of all steps, times 1 - (1 - i / warmup) (1 - ratio) during the warm-up."""
    i, steps, warmup = np.float64(i), np.float64(steps), np.float64(warmup)
    decayed = 1e-3 * (1 - i / steps) ** 1.0
    return decayed * (1 - (1 - i / warmup) * (1 - 1e-6)) if i < warmup else decayed


def dinov3_linear(i, steps, warmup):
    """DINOv3: s scheduler steps are taken before iteration i, none after iteration 0."""
    s, steps, warmup = np.float64(max(0, i - 1)), np.float64(steps), np.float64(warmup)
    if s < warmup:
        return 1e-3 * (1 - (1 - s / warmup) * (1 - 1e-6)) * (1 - s / steps)
    return 1e-3 * (1 + np.cos(np.pi * (s + 1) / steps)) / 2


def eomt(t, steps, warmup, vit_warmup, *, vit):
    """EoMT: multiplier of the head, or of the ViT, whose warm-up begins where that of the head ends."""
    t, begin = np.float64(t), np.float64(warmup if vit else 0)
    length = vit_warmup if vit else warmup
    if t < begin:
        return 0.0
    if t < begin + length:
        return (t - begin) / length
    return (1 - (t - begin - length) / (steps - begin - length)) ** np.float64(0.9)


@pytest.mark.parametrize(("recipe", "rule"), [(DINOV2_LINEAR, dinov2_linear), (DINOV3_LINEAR, dinov3_linear)])
def test_rates_of_the_linear_probes(recipe, rule):
    """Each parameter of the head, norm and bias too, has the rate and the whole decay; the backbone has none."""
    make, factor = parts_of(recipe)
    model = segmenter(partial(LinearHead, 24, 1, 150), Frozen)
    optimizer = make(model)
    expected = {DINOV2_LINEAR: 1e-4, DINOV3_LINEAR: 1e-3}[recipe]
    assert optimizer.defaults["betas"] == (0.9, 0.999) and optimizer.defaults["eps"] == 1e-8
    names = {f"head.{name}" for name, _ in model.head.named_parameters()}
    assert {"head.norm.bias", "head.classify.bias"} < names
    for step in (0, 1, 2, 751, 1499, 1500, 1501, 20000, 31415, 39999):
        found = rates_at(optimizer, factor, step, 40000)
        assert found.keys() == names
        rate = rule(step, 40000, 1500)
        assert all(value == (pytest.approx(rate, rel=1e-9), expected) for value in found.values())
    rng = np.random.default_rng(0)
    for steps, share in zip(rng.integers(3, 90001, 50) | 1, rng.random(50), strict=True):
        warmup = int(share * steps)
        other = schedule(**yaml.safe_load(recipe)["schedule"] | {"warmup": warmup})
        for step in rng.integers(0, steps, 10):
            assert 1e-3 * other(int(step), int(steps)) == pytest.approx(rule(step, steps, warmup), rel=1e-9, abs=1e-18)


def tiny(family, depth):
    """Return a segmenter with an EoMT head of 4 blocks on a transformer of `depth` blocks of 16 channels."""
    arch = {"hidden_size": 16, "num_hidden_layers": depth, "num_attention_heads": 2, "image_size": 32}
    arch |= {"intermediate_size": 16} if family == "dinov3_vit" else {"mlp_ratio": 1}
    arch |= {} if family == "dinov2" else {"num_register_tokens": 4}
    backbone = TransformersVit(family, arch, "random", 16)
    return SegmentationModel(Full()(backbone), EomtHead(16, 1, 150, patch_size=16, num_queries=5, blocks=4))


def exponent(name, depth):
    """Return the power of the layer decay of a parameter of a backbone; None: it belongs to the head."""
    if name.startswith("head."):
        return None
    block = re.search(r"\.layer\.(\d+)\.", name)
    if block:
        return depth - 1 - int(block[1])
    return 0 if re.search(r"\bmodel\.(norm|layernorm)\.", name) else depth - 1


@pytest.mark.parametrize(
    ("family", "depth", "recipe", "lr", "llrd", "warmups", "steps"),
    [
        ("dinov2", 24, EOMT, 1e-4, 0.8, (500, 1000), 31 * 1262),
        ("dinov2_with_registers", 12, EOMT, 1e-4, 0.8, (500, 1000), 107 * 186),
        ("dinov3_vit", 12, EOMT, 1e-4, 0.8, (500, 1000), 31 * 1262),
        ("dinov3_vit", 24, EOMT_DINOV3, 2e-4, 1.0, (2000, 3000), 16 * 1262),
    ],
)
def test_rates_of_eomt(family, depth, recipe, lr, llrd, warmups, steps):
    model = tiny(family, depth)
    make, factor = parts_of(recipe)
    optimizer = make(model)
    first = warmups[0]
    both = sum(warmups)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    powers = {name: exponent(name, depth) for name in trained}
    assert {*powers.values()} == {None, *range(depth)}
    embeddings = [name for name in trained if "embeddings" in name]
    assert len(embeddings) >= 4 and {powers[name] for name in embeddings} == {depth - 1}
    assert sum(power == 0 for power in powers.values()) > 2, "the last block and the final norm"
    assert optimizer.defaults["betas"] == (0.9, 0.999) and optimizer.defaults["eps"] == 1e-8
    for step in (0, 1, first - 1, first, first + 1, both - 1, both, both + 1, steps // 2, steps - 1):
        head, vit = (eomt(step, steps, *warmups, vit=vit) for vit in (False, True))
        found = rates_at(optimizer, factor, step, steps)
        assert found.keys() == trained
        for name, power in powers.items():
            rate = lr * head if power is None else lr * llrd**power * vit
            assert found[name] == (pytest.approx(rate, rel=1e-9), 0.05), name


@pytest.mark.parametrize("steps", [16 * 1262, 12 * 7391])
def test_rates_of_pmt(steps):
    """`WarmupCosineSchedule` of tue-mps/pmt with a rate of 2e-4, a warm-up of 6,000 steps and a least rate of 1e-9."""
    make, factor = parts_of(PMT)
    optimizer = make(segmenter(adapter=Frozen))
    for step in (*range(20), 2999, 5999, 6000, 6001, 12_345, steps - 2, steps - 1):
        decayed = 1e-9 + 0.5 * (2e-4 - 1e-9) * (1 + math.cos(math.pi * (step - 6000) / (steps - 6000)))
        rate = 2e-4 * step / 6000 if step < 6000 else decayed
        found = rates_at(optimizer, factor, step, steps)
        assert found and all(value == (pytest.approx(rate, rel=1e-9), 0.05) for value in found.values())


def test_rates_of_slotcontrast_and_videosaur():
    make, factor = parts_of(SLOTS)
    optimizer = make(segmenter(adapter=Frozen))
    for steps in (100_000, 300_000):
        for step in (0, 1, 2, 1250, 2499, 2500, 2501, 10_007, 51_250, steps - 1):
            rate = 4e-4 * (step / 2500 if step < 2500 else 0.5 ** ((step - 2500) / (steps - 2500)))
            found = rates_at(optimizer, factor, step, steps)
            assert all(value == (pytest.approx(rate, rel=1e-12), 0.0) for value in found.values())


@pytest.mark.parametrize("seed", range(4))
def test_schedules_without_warmup_are_those_of_pytorch(seed):
    rng = np.random.default_rng(seed)
    steps = int(rng.integers(5, 200))
    power = float(rng.uniform(0.3, 3))
    least = float(rng.uniform(0, 0.5))
    optimizers = [torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0) for _ in range(3)]
    kinds = torch.optim.lr_scheduler
    cosine = kinds.CosineAnnealingLR(optimizers[0], steps, eta_min=least), schedule("cosine", min_lr_ratio=least)
    poly = kinds.PolynomialLR(optimizers[1], steps, power), schedule("poly", power=power)
    falling = kinds.ExponentialLR(optimizers[2], 0.5 ** (1 / steps)), schedule("exponential", min_lr_ratio=0.5)
    for theirs, ours in (cosine, poly, falling):
        for step in range(steps + 1):
            assert ours(step, steps) == pytest.approx(theirs.get_last_lr()[0], abs=1e-6)
            theirs.optimizer.step()
            theirs.step()


@pytest.mark.parametrize("seed", range(3))
def test_warmups_against_their_formula(seed):
    rng = np.random.default_rng(seed)
    for _ in range(50):
        steps = int(rng.integers(20, 9999))
        power = rng.uniform(0.5, 2)
        least = rng.uniform(0, 0.3)
        first, second = (int(rng.integers(0, steps // 3)) for _ in range(2))
        start = None if rng.random() < 0.3 else float(rng.random())
        decays, vit = bool(rng.random() < 0.5), bool(rng.random() < 0.5)
        rise = {"warmup": first, "backbone_warmup": second, "warmup_start": start, "warmup_decays": decays}
        factor = schedule("poly", **rise, power=power, min_lr_ratio=least)
        begin, end = (first, first + second) if vit else (0, first)
        for step in (int(each) for each in rng.integers(0, steps, 8)):
            lowest = 1 / (end - begin + 1) if start is None else start
            risen = np.interp(step, [begin, end], [lowest, 1.0]) if begin < end else 1.0
            done = step / steps if decays else max(0, step - end) / (steps - end)
            expected = 0.0 if step < begin else risen * (least + (1 - least) * (1 - done) ** power)
            assert factor(step, steps, vit) == pytest.approx(expected, rel=1e-9, abs=1e-15)


def test_shares_of_both_warmups():
    factor = schedule("constant", warmup=0.1, warmup_start=0, backbone_warmup=0.2)
    assert [factor(step, 50, True) for step in (4, 5, 6, 14, 15)] == pytest.approx([0, 0, 0.1, 0.9, 1])
    alike_without = schedule("constant", warmup=0.1, warmup_start=0)
    assert [alike_without(step, 50, True) for step in range(50)] == [factor(step, 50) for step in range(50)]


def test_beit_and_matrices_are_the_default():
    model = segmenter()
    plain = adamw(model, lr=1.0, weight_decay=0.1, layer_decay=0.5)
    named = adamw(model, lr=1.0, weight_decay=0.1, layer_decay=0.5, layer_decay_rule="beit", weight_decay_on="matrices")
    assert plain.param_groups == named.param_groups


def test_resuming_in_the_second_warmup_equals_one_run(tmp_path, monkeypatch):
    shape = schedule("poly", warmup=2, warmup_start=0, backbone_warmup=3)
    before = parts(segmenter())[0]
    whole, _ = train(tmp_path / "whole", begin=0.0, steps=8, schedule=shape)
    assert not alike(parts(whole)[0], before)
    begun = segmenter()
    last = tmp_path / "part" / "last.safetensors"
    with monkeypatch.context() as patch, pytest.raises(OSError, match="the disk is gone"):
        fail_after(patch, CrossEntropy, "forward", 3, OSError("the disk is gone"))
        train(tmp_path / "part", begin=0.0, steps=8, schedule=shape, model=begun)
    assert alike(parts(begun)[0], before), "the backbone's rate is 0 until its warm-up's second step"
    resumed, _ = train(tmp_path / "part", begin=0.0, steps=8, schedule=shape, start=last)
    assert all(alike(one, two) for one, two in zip(parts(whole), parts(resumed), strict=True))
    assert math.isclose(shape(7, 8, True), (1 / 3) ** 0.9)


WORDS = [
    *("mode=train", "hparam=linear_ade20k", "data=folder", "data.root=data", "data.classes=[a,b,c]", "seed=3"),
    *("backbone=timm", "backbone.name=test_vit", "backbone.weights=random", "head.dropout=0", "engine=cpu"),
    *("resolution.crop=[64,64]", "inference.size=64", "inference.stride=43", "inference.shortest=64"),
    *("trainer.steps=9", "optim.schedule.warmup=3", "trainer.val_every=9", "trainer.log_every=1"),
    *("data.batch_size=4", "optim.optimizer.weight_decay=0.5", "engine.workers=0"),
]


def test_a_training_of_the_linear_probe_equals_a_loop_in_pytorch(tmp_path, monkeypatch):
    """With the recipe of DINOv3, on the same views."""
    rng = np.random.default_rng(0)
    for split, number in [("train", each) for each in range(6)] + [("val", each) for each in range(2)]:
        mask = rng.integers(0, 3, (6, 9)).repeat(12, 0).repeat(12, 1).astype(np.uint8)
        image = (60 * mask[..., None] + rng.integers(0, 90, (*mask.shape, 3))).astype(np.uint8)
        mask[:5] = 255
        save(tmp_path / f"data/{split}/images/{number}.png", image)
        save(tmp_path / f"data/{split}/masks/{number}.png", mask)
    heads, features, masks = [], [], []
    forward, loss = LinearHead.forward, CrossEntropy.forward

    def forward_and_record(head, maps):
        if head.training:
            heads.append({name: value.detach().double() for name, value in head.state_dict().items()})
            features.append(torch.cat(maps, 1).detach().double())
        return forward(head, maps)

    def loss_and_record(criterion, prediction, batch):
        masks.append(batch.mask.long())
        return loss(criterion, prediction, batch)

    monkeypatch.setattr(LinearHead, "forward", forward_and_record)
    monkeypatch.setattr(CrossEntropy, "forward", loss_and_record)
    tensors, _ = train_run(tmp_path, "run", *WORDS)

    norm = nn.BatchNorm2d(features[0].shape[1]).double()
    classify = nn.Conv2d(features[0].shape[1], 3, 1).double()
    plain = nn.ModuleDict({"norm": norm, "classify": classify})
    plain.load_state_dict(heads[0])
    norm.reset_running_stats()  # the first forward pass has already updated them
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3, betas=(0.9, 0.999), weight_decay=0.5)
    losses = []
    for step in range(9):
        optimizer.param_groups[0]["lr"] = dinov3_linear(step, 9, 3)
        logits = F.interpolate(classify(norm(features[step])), (64, 64), mode="bilinear")
        value = F.cross_entropy(logits, masks[step], ignore_index=255, reduction="sum") / masks[step].numel()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    np.testing.assert_allclose(values_of(rows(tmp_path, "run"), "train/loss"), losses, rtol=2e-6)
    for name, value in plain.state_dict().items():
        (found,) = [tensor for key, tensor in tensors.items() if key.endswith(f"head.{name}") and "optim" not in key]
        torch.testing.assert_close(found.double(), value.double(), rtol=1e-4, atol=2e-6)
