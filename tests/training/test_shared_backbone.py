"""Heads on one frozen backbone: one pass for all, and none has an influence on another."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from checkpoint_files import INFO
from dinoseg.training.head_training import DROPPED, HeadTraining
from log_rows import Rows
from test_trainer import Stripes
from torch import nn

from dinoseg.data.transforms import Augment
from dinoseg.experiment.models import _lend_tensors
from dinoseg.losses.cross_entropy import CrossEntropy
from dinoseg.models.heads.linear import LinearHead
from dinoseg.models.model import SegmentationModel
from dinoseg.training.checkpoint import Checkpointer, read
from dinoseg.training.engine import Engine
from dinoseg.training.image_data_module import ImageDataModule
from dinoseg.training.multi_head import (
    MultiHeadCheckpoints,
    MultiHeadExperiment,
    MultiHeadSegmenter,
    join_optimizers,
)
from dinoseg.training.optim import adamw, schedule
from dinoseg.training.step import MetricsQueue, StepMetrics
from dinoseg.training.trainer import Settings, fit
from dinoseg.utils.errors import UserError

IMAGES = torch.randint(0, 256, (2, 3, 17, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


class Dropping(LinearHead):
    """A head with random draws in training."""

    def forward(self, features):
        return super().forward([F.dropout(part, 0.3, self.training) for part in features])


class Own(LinearHead):
    """A head that runs the backbone in a way of its own."""

    def run(self, backbone, images):
        return self(backbone(images))


class Rough(LinearHead):
    """A head that changes its features."""

    def forward(self, features):
        return super().forward([nn.functional.relu_(part) for part in features])


class Noisy(CrossEntropy):
    """A loss with random draws, which is not finite at one of its calls in training."""

    def __init__(self, fails_at=-1):
        super().__init__(torch.ones(3))
        self.calls, self.fails_at = 0, fails_at

    def forward(self, prediction, batch):
        value, parts = super().forward(prediction, batch)
        if not torch.is_grad_enabled():
            return value, parts
        self.calls += 1
        return value * (1 + 0.1 * torch.rand(())) * (torch.nan if self.calls == self.fails_at else 1), parts


@pytest.fixture
def made(tiny_backbone):
    """Return a maker of a model of several heads, and the passes of the backbone so far."""
    whole, passes = tiny_backbone((0, 1)).requires_grad_(False).eval(), []
    whole.norm.register_forward_hook(lambda *_: passes.append(1))

    def model(*heads, folder=None, losses=None):
        members = []
        for number, (layers, head) in enumerate(heads):
            part = tiny_backbone(layers).requires_grad_(False)
            _lend_tensors(whole, part)
            torch.manual_seed(number)
            solo = SegmentationModel(part, head(24, len(layers), 3))
            own = Checkpointer(folder / str(number) / "checkpoints", dict(INFO)) if folder else None
            loss = losses[number] if losses else None
            members.append(HeadTraining(solo, loss, own, Rows(), name=str(number)))
        return MultiHeadSegmenter(whole, members), members

    return SimpleNamespace(model=model, passes=passes)


def test_each_gets_its_own_blocks_of_one_pass(made):
    model, members = made.model(*((layers, LinearHead) for layers in [(-1,), (0,), (0, 1), (1, 0)]))
    model.eval()
    for images in (IMAGES, IMAGES[:, :, :1, :1], IMAGES.float() / 255):
        made.passes.clear()
        predictions = model(images)
        assert len(made.passes) == 2, "a norm for each of two blocks"
        for member, prediction in zip(members, predictions, strict=True):
            assert torch.equal(prediction.scores(), member.model.eval()(images).scores())
    members[1].is_active = False
    assert [prediction is None for prediction in model(IMAGES)] == [False, True, False, False]


def test_a_head_with_a_way_of_its_own_runs_the_backbone(made):
    model, members = made.model(((1,), Own))
    assert torch.equal(model.eval()(IMAGES)[0].scores(), members[0].model.eval()(IMAGES).scores()) and not made.passes


def test_a_head_that_changes_its_features_is_named(made):
    model, _ = made.model(((1,), LinearHead), ((1,), Rough))
    with pytest.raises(UserError, match="1 modified its input features in place"):
        model.train()(IMAGES)


@pytest.fixture
def train(made, tmp_path):
    """Train heads, and return the members."""

    def run(name, *heads, losses=None, start=None, **options):
        folder, engine = tmp_path / name, Engine("cpu", "fp32", workers=0)
        losses = losses or [Noisy() for _ in heads]
        model, members = made.model(*heads, folder=folder, losses=losses)
        data = Stripes([(32, 40)] * 6), Stripes([(32, 40), (19, 23)])
        data_module = ImageDataModule(*data, Augment((24, 32)), 3, seed=0, workers=0)
        rates = [1e-2, 3e-3, 1e-3]
        optimizer = join_optimizers([adamw(each.model, lr=rate) for each, rate in zip(members, rates, strict=False)])
        found = read(folder / "last.safetensors") if start else None
        checkpoints = MultiHeadCheckpoints(folder, dict(INFO), found, members=members)
        parts = (model, members[0].criterion, data_module, optimizer, schedule(), engine, checkpoints, Rows())
        lengths = {"steps": 6, "val_every": 2, "log_every": 1, "accumulate": 2, "clip": 0.5, "ema": 0.5}
        fit(MultiHeadExperiment(*parts, Settings(**{**lengths, **options}), members))
        return members

    return run


def outcome(member):
    rows = [{key: row[key] for key in row if key in ("train/loss", "val/miou", "train/lr")} for row in member.log.rows]
    return rows, read(member.checkpoints.folder / "best.safetensors").tensors


def assert_equal(one, other):
    assert one[0] == other[0] and one[1].keys() == other[1].keys()
    assert all(torch.equal(value, other[1][key]) for key, value in one[1].items())


def test_heads_with_random_draws_have_no_influence_on_one_another(train):
    together = train("three", ((1,), Dropping), ((0,), Dropping), ((0, 1), LinearHead))
    alone = train("one", ((1,), Dropping))
    assert_equal(outcome(together[0]), outcome(alone[0]))
    assert [row["train/lr"] for row in together[1].log.rows if "train/lr" in row][0] == 3e-3


def test_a_head_whose_loss_is_not_finite_drops_out_and_the_others_train_on(train, caplog):
    both = train("both", ((1,), Dropping), ((0,), Dropping), losses=[Noisy(), Noisy(fails_at=6)])
    assert_equal(outcome(both[0]), outcome(train("alone", ((1,), Dropping))[0]))
    assert "1 is dropped; the other heads continue. Step 2: the loss is nan" in caplog.text
    assert [member.progress.step for member in both] == [6, 2]
    assert (both[1].checkpoints.folder.parent / DROPPED).exists()
    again = train("both", ((1,), Dropping), ((0,), Dropping), start=True, steps=8)
    assert [member.progress.step for member in again] == [8, 2] and "the loss is nan" in again[1].dropped
    assert not [row for row in again[1].log.rows], "what has dropped out stays out"


def test_a_head_that_trains_on_after_a_fault_past_the_last_save_is_no_dropped_one(train):
    members = train("both", ((1,), LinearHead), ((0,), LinearHead))
    note = members[1].checkpoints.folder.parent / DROPPED
    note.write_text("{}")
    train("both", ((1,), LinearHead), ((0,), LinearHead), start=True, steps=8)
    assert not note.exists()


def test_a_step_is_saved_only_where_each_head_in_training_is_finite(made):
    _, members = made.model(((1,), LinearHead), ((0,), LinearHead))
    queue = MetricsQueue(Engine("cpu", "fp32"), None, members)
    queue._unread.append(StepMetrics(3, [], torch.ones(2), torch.tensor([1.0, torch.nan]), torch.zeros(())))
    assert not queue.are_finite()
    members[1].is_active = False
    assert queue.are_finite()


def test_where_none_is_left_the_training_ends(train):
    (member,) = train("none", ((1,), LinearHead), losses=[Noisy(fails_at=4)])
    assert member.progress.step == 1 and member.progress.best is None


def test_a_head_without_a_better_score_stops_alone(train, monkeypatch):
    scores = {"0": iter([0.1, 0.2, 0.3]), "1": iter([0.3, 0.2])}
    whole = MultiHeadExperiment.validate

    def scored(experiment, heads):
        found = whole(experiment, heads)
        return [
            each._replace(scores={"miou": next(scores[head.name])}) for head, each in zip(heads, found, strict=True)
        ]

    monkeypatch.setattr(MultiHeadExperiment, "validate", scored)
    members = train("stopped", ((1,), LinearHead), ((0,), LinearHead), patience=1)
    assert [member.progress.step for member in members] == [6, 4]
    assert [member.progress.best_step for member in members] == [6, 2]
