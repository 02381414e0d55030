"""Averaged models against averaging by hand, with shared backbones and without."""

import copy
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from tiny_parts import tiny_vit
from torch import nn

from dinoseg.core.contracts import Head
from dinoseg.core.geometry import upsample
from dinoseg.core.task import SEMANTIC, MultilabelTask
from dinoseg.extensions.ensembles.strategy import AveragedModel, AveragedStrategy, shares_backbone
from dinoseg.inference.auto import Auto
from dinoseg.inference.predictor import Predictor
from dinoseg.inference.windows import Whole, Windows
from dinoseg.models.model import SegmentationModel

CLASSES = 4
STRATEGIES = {
    "one image": Whole,
    "flips and scales": partial(Whole, flips="all", scales=(0.5, 1.0)),
    "windows": partial(Windows, (16, 24), flips="horizontal", scales=(1.0, 1.5)),
    "windows of scores": partial(Windows, (16, 24), average="scores", flips="horizontal"),
    "auto": partial(Auto, 24),
}


class TinyHead(Head):
    """Class scores of each cell: logits, or a mixture of masks whose sum over the classes is not 1."""

    def __init__(self, seed, *, mixture=False):
        super().__init__()
        torch.manual_seed(seed)
        self.layer, self.mixture = nn.Conv2d(24, CLASSES, 1), mixture
        nn.init.normal_(self.layer.weight)

    def forward(self, features):
        scores = self.layer(features[0])
        return scores.sigmoid() if self.mixture else scores

    def predict(self, outputs, size, valid):
        return upsample(outputs, size, valid)


def make_backbone(seed=0):
    backbone = tiny_vit().requires_grad_(False)
    draw = torch.Generator().manual_seed(seed)
    for parameter in backbone.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=draw)
    return backbone


def make_member(seed, strategy, *, backbone=0, mixture=False, task=SEMANTIC, **sizes):
    model = SegmentationModel(make_backbone(backbone), TinyHead(seed, mixture=mixture), task=task, **sizes).eval()
    return Predictor(model, torch.device("cpu"), nullcontext, strategy())


def average(members):
    return Predictor(members[0].model, members[0].device, nullcontext, AveragedStrategy(members))


def draw_images(count=2, size=(37, 53)):
    return [*np.random.default_rng(0).integers(0, 256, (count, *size, 3)).astype(np.uint8)]


def count_passes(predictor, backbones, images):
    passes = []
    hooks = [backbone.blocks[0].register_forward_hook(lambda *_: passes.append(1)) for backbone in backbones]
    found = predictor.probabilities(images)
    for hook in hooks:
        hook.remove()
    return found, len(passes)


def assert_averaged(members, images):
    """Compare with the mean of what each member predicts by itself."""
    by_hand = torch.stack([copy.deepcopy(member).probabilities(images).double() for member in members]).mean(dim=0)
    found = average(members).probabilities(images)
    assert (found.double() - by_hand).abs().max() < 1e-6
    return found


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("backbones", [(0, 0, 0), (0, 1, 0), (0, 1, 2)])
def test_probabilities_equal_those_averaged_by_hand(name, backbones):
    members = [make_member(seed, STRATEGIES[name], backbone=each) for seed, each in enumerate(backbones)]
    found = assert_averaged(members, draw_images())
    ids = average(members).ids(draw_images())
    assert torch.equal(SEMANTIC.decide(found), torch.from_numpy(ids))


def test_members_of_other_strategies_and_heads_are_averaged():
    members = [
        make_member(0, STRATEGIES["windows"]),
        make_member(1, Whole, scale=0.5),
        make_member(2, Whole, longest=24, mixture=True),
        make_member(3, STRATEGIES["flips and scales"], mixture=True),
    ]
    assert_averaged(members, draw_images())


def test_each_layer_of_a_multilabel_task_is_averaged():
    members = [make_member(seed, Whole, task=MultilabelTask(CLASSES, [0.2, 0.4, 0.5, 0.7])) for seed in range(2)]
    found = assert_averaged(members, draw_images())
    assert (found.sum(dim=1) - 1).abs().max() > 0.1
    assert torch.equal(members[0].model.task.decide(found), torch.from_numpy(average(members).ids(draw_images())))


@pytest.mark.parametrize(("backbones", "passes"), [((0, 0, 0), 1), ((0, 1, 0), 2), ((0, 1, 2), 3)])
def test_a_shared_frozen_backbone_runs_once(backbones, passes):
    members = [make_member(seed, Whole, backbone=each) for seed, each in enumerate(backbones)]
    averaged = average(members)
    _, found = count_passes(averaged, {member.model.backbone for member in members}, draw_images())
    assert found == passes
    assert len({member.model.backbone for member in members}) == passes


def test_members_are_merged_only_if_that_changes_no_prediction():
    first = make_member(0, Whole)
    trained = make_member(1, Whole)
    trained.model.backbone.requires_grad_(True)
    near = make_member(1, Whole)
    near.model.backbone.blocks[0].requires_grad_(False)
    with torch.no_grad():
        next(near.model.backbone.blocks.parameters()).view(-1)[0] += 1e-6
    own_run = make_member(1, Whole)
    own_run.model.head = type("Own", (TinyHead,), {"run": lambda self, backbone, images: self(backbone(images))})(1)
    others = {
        "trained": trained,
        "another weight": near,
        "another strategy": make_member(1, STRATEGIES["windows"]),
        "other flips": make_member(1, STRATEGIES["flips and scales"]),
        "another scale": make_member(1, Whole, scale=0.5),
        "another limit": make_member(1, Whole, longest=30),
        "a head that runs the blocks": own_run,
    }
    assert shares_backbone(first, make_member(1, Whole))
    assert [name for name, other in others.items() if shares_backbone(first, other)] == []
    scores = [make_member(seed, STRATEGIES["windows of scores"]) for seed in range(2)]
    assert not shares_backbone(*scores)


def test_members_of_other_sizes_are_merged_for_small_images():
    members = [make_member(seed, Whole) for seed in range(2)]
    members[0].model.limit = lambda size: 24 if max(size) > 40 else None
    strategy = AveragedStrategy(members)
    assert [*strategy.groups_of((30, 40))] == [(0, 1)]
    assert [*strategy.groups_of((30, 60))] == [(0,), (1,)]
    assert_averaged(members, draw_images(size=(30, 60)))


@pytest.mark.parametrize("backbones", [(0, 0, 1), (0, 1, 2)])
def test_offloaded_models_predict_the_same(backbones, monkeypatch):
    def make_members():
        return [make_member(seed, STRATEGIES["windows"], backbone=each) for seed, each in enumerate(backbones)]

    whole = AveragedStrategy(make_members())
    offloaded = AveragedStrategy(make_members(), offload=True)
    moves = []
    to = nn.Module.to
    monkeypatch.setattr(nn.Module, "to", lambda self, device: moves.append(str(device)) or to(self, device))
    found = []
    for strategy in (whole, offloaded):
        strategy.ids = {}
        first = strategy.members[0]
        found.append(Predictor(first.model, first.device, nullcontext, strategy).probabilities(draw_images()))
    assert (found[0] - found[1]).abs().max() < 1e-6
    assert len(moves) == 2 * len({*backbones})
    for member in range(3):
        first, second = (torch.cat(strategy.ids[member], dim=-2) for strategy in (whole, offloaded))
        assert torch.equal(first, second)


def test_a_model_leaves_the_device_after_an_error(monkeypatch):
    moves = []
    strategy = AveragedStrategy([make_member(seed, Whole, backbone=seed) for seed in range(2)], offload=True)
    monkeypatch.setattr(nn.Module, "to", lambda _, device: moves.append(str(device)))
    monkeypatch.setattr(strategy.members[0].model, "head", None)
    with pytest.raises(AttributeError):
        Predictor(strategy.members[0].model, torch.device("cpu"), nullcontext, strategy).probabilities(draw_images())
    assert len(moves) == 2


def test_a_single_member_leaves_the_device_after_its_passes(monkeypatch):
    moves, passes = [], []
    strategy = AveragedStrategy([make_member(seed, Whole, backbone=seed) for seed in range(2)], offload=True)
    strategy.active = [1]
    to = nn.Module.to
    monkeypatch.setattr(nn.Module, "to", lambda self, device: moves.append(self) or to(self, device))
    images = torch.from_numpy(np.stack(draw_images())).permute(0, 3, 1, 2)
    predictor = Predictor(strategy.members[0].model, torch.device("cpu"), nullcontext, strategy)
    with torch.no_grad():
        predictor.run_bands(images, list, on_pass=lambda *given: passes.append(given))
    assert passes and moves == [strategy.members[1].model] * 2


def test_ids_of_members_are_their_own_predictions():
    members = [make_member(seed, STRATEGIES["windows"], backbone=seed % 2) for seed in range(3)]
    own = [member.ids(draw_images()) for member in copy.deepcopy(members)]
    averaged = average(members)
    averaged.strategy.ids = {}
    averaged.ids(draw_images())
    for member, ids in enumerate(own):
        assert np.array_equal(torch.cat(averaged.strategy.ids[member], dim=-2).numpy(), ids)


def test_one_pass_over_whole_images_is_averaged():
    members = [make_member(seed, Whole) for seed in range(2)]
    members += [make_member(2, Whole, scale=0.5), make_member(3, Whole, mixture=True)]
    images = torch.from_numpy(np.stack(draw_images())).permute(0, 3, 1, 2)
    with torch.no_grad():
        by_hand = torch.stack([member.model(images).probabilities().double() for member in members]).mean(dim=0)
        prediction = AveragedModel(AveragedStrategy(members)).eval()(images)
    assert (prediction.probabilities().double() - by_hand).abs().max() < 1e-6
    assert prediction.mixture and prediction.valid == members[0].model(images).valid


def test_fewer_members_predict_where_they_alone_are_active():
    members = [make_member(seed, Whole, task=MultilabelTask(CLASSES)) for seed in range(3)]
    own = members[1].probabilities(draw_images())
    averaged = average(members)
    averaged.strategy.active = [1]
    assert (averaged.probabilities(draw_images()) - own).abs().max() < 1e-6
