"""A backbone that rests learns nothing, costs no gradient and keeps its statistics, until its share is done."""

import logging
from functools import partial

import pytest
import torch
from failing import fail_after
from small_trainings import Stripes, segmenter, train_model
from torch import nn

from dinoseg.core.contracts import Backbone
from dinoseg.data.transforms import Augment
from dinoseg.extensions.feature_cache.choice import CacheOptions, feature_cache
from dinoseg.extensions.query_heads.eomt import EomtHead
from dinoseg.losses.cross_entropy import CrossEntropy
from dinoseg.losses.mask_classification import MaskClassification
from dinoseg.models.adapters import Full, LastBlocks, Lora
from dinoseg.models.heads.detail import DetailHead
from dinoseg.models.heads.linear import LinearHead
from dinoseg.models.model import SegmentationModel
from dinoseg.training.checkpoint import read
from dinoseg.training.engine import Engine
from dinoseg.training.freeze import build_freeze
from dinoseg.training.image_data_module import ImageDataModule
from dinoseg.training.optim import adamw, parameter_groups, schedule, set_learning_rates

LAST_BLOCK = partial(LastBlocks, blocks=1)


def train(folder, *, begin=0.5, steps=6, start=None, model=None, watch=None, cached=False, **options):
    """Train on stripes, and return the model and its optimizer."""
    model = model or segmenter()
    engine = Engine("cpu", "fp32", workers=0, cache="memory" if cached else "off")
    data = Stripes([(24, 32)] * 6), Stripes([(24, 32)] * 2)
    order = {"batch_size": 2, "seed": 0, "workers": 0, "views": 1 if cached else None}
    data_module = ImageDataModule(*data, Augment((24, 32)), **order)
    plan = CacheOptions(folder / "cache", 3.0, "", {}, dtype="float32")
    data_module.cache = feature_cache(data_module, model, engine, plan)
    optimizer = adamw(model, head_lr=1e-2, backbone_lr=1e-3, freeze_backbone_until=begin)
    if watch:
        model.backbone.register_forward_hook(lambda part, _, maps: watch(part, maps))
    options = {"schedule": schedule("constant"), "val_every": 100, "steps": steps, **options}
    start = start and read(start)
    train_model(model, data_module, folder, engine=engine, optimizer=optimizer, start=start, **options)
    return model, optimizer


def freeze_of(model, until, *, is_single=True):
    """Return the freeze of a model's backbone for a share of the steps."""
    return build_freeze(model.backbone, adamw(model, lr=1e-3, freeze_backbone_until=until), is_single=is_single)


def parts(model):
    """Return copies of what a backbone and a head hold."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    return tuple({name: value for name, value in state.items() if name.startswith(part)} for part in ("back", "head"))


def alike(one, two):
    return one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())


@pytest.mark.parametrize(
    "adapter", [Full, partial(Lora, rank=2, alpha=2), pytest.param(LAST_BLOCK, marks=pytest.mark.heavy)]
)
def test_head_trains_as_on_a_frozen_backbone_until_unfreezing(tmp_path, adapter):
    seen = []
    before, _ = parts(segmenter(adapter=adapter))
    model = segmenter(adapter=adapter)
    rested, _ = train(tmp_path / "rested", model=model, begin=0.999, watch=lambda _, maps: seen.append(maps))
    assert not any(map_.requires_grad for maps in seen for map_ in maps), "no gradient is computed"
    frozen = segmenter(adapter=adapter)
    frozen.backbone.requires_grad_(False)
    frozen, _ = train(tmp_path / "frozen", model=frozen.train(), begin=0.0)
    assert alike(parts(rested)[0], before)
    assert alike(parts(rested)[1], parts(frozen)[1]), "to the bit"
    assert any(parameter.requires_grad for parameter in rested.backbone.parameters()), "it is trained, all the same"


def test_backbone_trains_after_its_frozen_share(tmp_path):
    seen = []
    before = parts(segmenter())[0]
    learnt, optimizer = train(tmp_path, begin=0.4, steps=5, watch=lambda _, maps: seen.append(maps[0].requires_grad))
    assert seen[:5] == [False, False, True, True, True]
    after = parts(learnt)[0]
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert {f"backbone.{name}" for name, each in learnt.backbone.named_parameters() if each.requires_grad} == moved
    counts = {
        group["backbone"]: {optimizer.state[each]["step"].item() for each in group["params"]}
        for group in optimizer.param_groups
    }
    assert counts == {True: {3.0}, False: {5.0}}


def test_frozen_phase_uses_eval_mode_and_fixed_running_means(tmp_path):
    """A backbone with BatchNorm and dropout, whose features would move with its mode."""

    class Normed(Backbone):
        patch_size, dim, num_layers, depth = 8, 24, 1, 1

        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 24, 8, 8), nn.BatchNorm2d(24), nn.Dropout(0.5))
            self.register_buffer("mean", torch.zeros(3, 1, 1))
            self.register_buffer("std", torch.ones(3, 1, 1))

        def forward(self, images):
            return [self.body(self.pixels(images))]

    modes = []

    def watch(part, _):
        modes.append({module.training for module in part.modules()})

    model = SegmentationModel(Full()(Normed()), LinearHead(24, 1, 3))
    before = parts(model)[0]
    for parameter in model.backbone.parameters():
        parameter.requires_grad_(True)
    model, _ = train(tmp_path / "a", model=model, begin=0.999, steps=3, watch=watch)
    assert modes[:3] == [{False}] * 3 and alike(parts(model)[0], before)
    assert {module.training for module in model.backbone.modules()} == {True}, "as before"
    modes.clear()
    model, _ = train(tmp_path / "b", model=model, begin=0.5, steps=2)
    assert modes[:2] == [{False}, {True}] and not alike(parts(model)[0], before)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Return the model and the last checkpoint of a training that is frozen for half of its steps."""
    folder = tmp_path_factory.mktemp("whole")
    return train(folder, ema=0.5)[0], read(folder / "last.safetensors").tensors


@pytest.mark.parametrize("stop", [2, 4], ids=["while it rests", "afterwards"])
def test_resuming_the_frozen_phase_is_exact(uninterrupted, tmp_path, monkeypatch, caplog, stop):
    caplog.set_level(logging.INFO)
    last = tmp_path / "last.safetensors"
    with monkeypatch.context() as patch, pytest.raises(OSError, match="gone"):
        fail_after(patch, CrossEntropy, "forward", stop, OSError("the disk is gone"))
        train(tmp_path, ema=0.5)
    assert read(last).info["progress"]["step"] == stop
    assert caplog.text.count("is frozen for 3 of the 6 remaining steps") == 1
    again, _ = train(tmp_path, start=last, ema=0.5)
    assert ("is frozen for 1 of the 4 remaining steps" in caplog.text) == (stop == 2), "from where it goes on"
    assert caplog.text.count("The backbone is frozen") == (2 if stop == 2 else 1)
    assert alike(parts(again)[0], parts(uninterrupted[0])[0]) and alike(read(last).tensors, uninterrupted[1])


def test_cached_features_equal_live_ones_in_the_frozen_phase(tmp_path):
    """The cut stays where it is, behind what is frozen for good: what rests is not part of it."""
    live, cached = (train(tmp_path, model=segmenter(adapter=LAST_BLOCK), cached=cached)[0] for cached in (False, True))
    for one, two in zip(parts(live), parts(cached), strict=True):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-4)


DETAIL = partial(DetailHead, 24, 1, 3, 8, 4, 8, 1, jitter=0, linear_skip=True)
EOMT = partial(EomtHead, 24, 1, 3, patch_size=8, num_queries=5, blocks=1)
OF_MASKS = MaskClassification(torch.ones(3), num_points=16)


@pytest.mark.parametrize(("head", "loss"), [(DETAIL, None), (EOMT, OF_MASKS)], ids=["detail", "eomt"])
def test_detail_and_eomt_heads_train_on_a_frozen_backbone(tmp_path, head, loss):
    """The queries of EoMT learn through blocks that freeze."""
    model = segmenter(head)
    before, fresh = parts(model)
    model, _ = train(tmp_path, model=model, begin=0.999, steps=2, loss=loss)
    assert alike(parts(model)[0], before)
    learnt = parts(model)[1]
    names = [f"head.{name}" for name, _ in model.head.named_parameters()]
    assert not [name for name in names if torch.equal(fresh[name], learnt[name])]


def test_error_in_the_frozen_phase_restores_the_model():
    def state():
        return [part.training for part in model.modules()], [each.requires_grad for each in model.parameters()]

    model = segmenter(adapter=LAST_BLOCK).train()
    before = state()
    assert {part.training for part in model.backbone.modules()} == {True, False}, "what is frozen stays in eval mode"
    with pytest.raises(MemoryError), freeze_of(model, 0.5).apply(0, 10, torch.zeros(1, 3, 8, 8)):
        assert not any(parameter.requires_grad for parameter in model.backbone.parameters())
        raise MemoryError
    assert state() == before


def test_several_ranks_expect_gradients_which_are_dropped():
    model = segmenter()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    freeze = freeze_of(model, 0.5, is_single=False)
    for step, left in ((4, True), (5, False)):
        with freeze.apply(step, 10, None):
            model(torch.rand(1, 3, 16, 16)).outputs.sum().backward()
            assert all(parameter.grad is not None for parameter in trained)
        dropped = {each.grad is None for each in model.backbone.parameters() if each.requires_grad}
        assert dropped == {left} and all(parameter.grad is not None for parameter in model.head.parameters())


def test_schedule_of_the_backbone_starts_when_unfrozen():
    """As of a training that is those steps alone, with their warm-up, of all that learns then."""
    model = segmenter()
    shape = schedule("cosine", warmup=0.25)
    optimizer = adamw(model, head_lr=0.5, backbone_lr=0.1, freeze_backbone_until=0.35)
    restarted = build_freeze(model.backbone, optimizer, is_single=True).restart(shape)
    for step in range(20):
        factor = shape(step, 7) if step < 7 else shape(step - 7, 13)
        assert set_learning_rates(optimizer, restarted, step, 20) == 0.5 * factor
        found = {group["backbone"]: group["lr"] for group in optimizer.param_groups}
        assert found == {True: 0.0 if step < 7 else 0.1 * factor, False: 0.5 * factor}


def test_frozen_steps_match_the_share_despite_rounding():
    """0.07 * 100 is more than 7, and 0.35 * 20 is not."""
    model = segmenter()
    for share, steps, first in ((0.07, 100, 7), (0.35, 20, 7), (0.4, 1060, 424), (0.5, 5, 3)):
        freeze = freeze_of(model, share)
        factor = freeze.restart(lambda step, steps, backbone=False: (step, steps, backbone))
        assert freeze.length(steps) == first
        assert factor(first - 1, steps) == (first - 1, first, False) and factor(first - 1, steps, True) == 0
        assert factor(first, steps, True) == (0, steps - first, True)


def test_delayed_head_modules_start_late_and_get_gradients(monkeypatch):
    model = segmenter()
    monkeypatch.setattr(type(model.head), "delayed_modules", (0.3, [model.head.norm]))
    plain = parameter_groups(model, lr=0.1, weight_decay=0.0)
    assert not any(group["frozen_until"] for group in plain if group["backbone"])
    with freeze_of(model, 0.3).apply(0, 10, None):
        assert all(parameter.requires_grad for parameter in model.head.parameters())
        assert not any(parameter.requires_grad for parameter in model.backbone.parameters())


@pytest.mark.parametrize(
    ("until", "start", "said"),
    [
        (0.5, 2, "is frozen for 1 of the 4 remaining steps"),
        (0.5, 3, ""),
        (0.8, 0, "is frozen for 5 of the 6 remaining steps"),
        (0.9, 0, "is frozen for all of the 6 remaining steps. Set a lower optim.optimizer.freeze_b"),
    ],
)
@pytest.mark.parametrize("is_single", [True, False])
def test_run_logs_the_length_of_the_frozen_phase(caplog, until, start, said, is_single):
    caplog.set_level(logging.INFO)
    freeze_of(segmenter(), until, is_single=is_single).log_length(start, 6)
    assert said in caplog.text and bool(caplog.text) == bool(said)
    # several ranks compute gradients all the same
    assert ("take less time" in caplog.text) == (is_single and said.endswith("steps"))
