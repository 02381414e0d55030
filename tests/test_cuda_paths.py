"""What is done on CUDA, tried without it: nothing mixes devices, and each place that waits for the device is known."""

import logging
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from checkpoint_files import INFO
from log_rows import Rows
from making import Pictures
from pretended_cuda import MixedDevices, Pretended, Waits, on_cuda, pretended_cuda, pretended_engine
from test_matrix import make_batch
from tiny_parts import tiny_vit

from dinoseg.core.shapes import MaskOutputs, Prediction
from dinoseg.extensions.tracking.propagation.settings import PropagationSettings
from dinoseg.extensions.tracking.propagation.tracker import PropagationTracker
from dinoseg.losses.cross_entropy import CrossEntropy
from dinoseg.losses.mask_classification import MaskClassification
from dinoseg.models.adapters import Full
from dinoseg.models.heads.linear import LinearHead
from dinoseg.models.model import SegmentationModel
from dinoseg.training.checkpoint import Checkpointer
from dinoseg.training.engine import Engine
from dinoseg.training.image_data_module import ImageDataModule
from dinoseg.training.optim import adamw, schedule
from dinoseg.training.step import MetricsQueue, NonFiniteLoss, StepMetrics
from dinoseg.training.trainer import Settings, TrainingSetup, fit
from dinoseg.utils.errors import UserError

VALIDATION = {  # at its end
    "metrics/confusion.py _raise_for_outsiders: read": 1,
    "metrics/confusion.py compute: copy to the host": 1,
    "metrics/confusion.py compute: read": 1,
    "metrics/confusion.py update: copy to the device": 1,
    "training/validation.py evaluate: read": 2,
}
LOGGED = {
    "metrics/confusion.py _raise_for_outsiders: read": 1,
    "metrics/confusion.py compute: copy to the host": 1,
    "metrics/confusion.py compute: read": 1,
    "training/step.py read: work just launched": 1,
}
MATCHING = {"losses/mask_classification.py match: copy to the host": 1}


class Noise(Pictures):
    """A data set of images whose left border is ignored."""

    def __init__(self, count):
        super().__init__([(16, 24)] * count)

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        sample["mask"][:, :2] = 255
        return sample


class Watched(ImageDataModule):
    """A feed that takes down what was waited for in each step, and in validations, and may fail at a batch."""

    def begin(self, waits=None, at=None, fails=None):
        self.steps, self.validations, self.waits, self.at, self.fails = [], [], waits or Waits(), at, fails
        return self

    def train_batches(self, start):
        for number, batch in enumerate(super().train_batches(start), start=start):
            if number:
                self.steps.append(self.waits.take())
            if number == self.at:
                self.fails(batch)
            self.waits.take()
            yield batch

    def validate(self, *given):
        self.steps.append(self.waits.take())
        found = super().validate(*given)
        self.validations.append(self.waits.take())
        return found


def train(folder, model, loss, *, cuda=True, precision="fp32", plain=False, device=pretended_cuda, **options):
    """Train with or without the pretended device; return the feed, the rows, the model's state and the error."""
    watch = {key: options.pop(key) for key in ("at", "fails") if key in options}
    start = options.pop("start", None)
    settings = Settings(**{"steps": 3, "val_every": 3, "log_every": 3, **options})
    log = Rows()
    error = None
    with device() as waits:
        data_module = Watched(Noise(4), Noise(2), lambda image, mask, _: (image, mask), 2, seed=0, workers=0)
        data_module.begin(waits if cuda and isinstance(waits, Waits) else None, **watch)
        engine = pretended_engine(precision=precision) if cuda else Engine("cpu", precision, workers=0)
        model, loss = (on_cuda(model), on_cuda(loss)) if cuda else (model, loss)
        optimizer = adamw(model, lr=1e-2)
        assert optimizer.defaults["fused"]
        optimizer = torch.optim.SGD(optimizer.param_groups, fused=True) if plain else optimizer
        checkpoints = Checkpointer(folder, dict(INFO), start)
        try:
            shape = schedule("constant")
            fit(TrainingSetup(model, loss, data_module, optimizer, shape, engine, checkpoints, log, settings))
        except UserError as caught:
            error = caught
    state = {name: getattr(value, "memory", value) for name, value in model.state_dict().items()}
    step = checkpoints.progress.step
    return SimpleNamespace(data_module=data_module, rows=log.rows, state=state, error=error, step=step)


def tiny():
    torch.manual_seed(0)
    return SegmentationModel(Full()(tiny_vit()), LinearHead(24, 1, 3)), CrossEntropy(torch.tensor([1.0, 0.5, 2.0]))


@pytest.mark.parametrize("bf16", [False, True])
def test_step_on_cuda_never_waits_and_equals_a_cpu(tmp_path, bf16):
    options = {"precision": "bf16" if bf16 else "fp32", "plain": True, "clip": 0.5}
    there, here = (train(tmp_path, *tiny(), cuda=cuda, **options) for cuda in (True, False))
    assert there.data_module.steps == [{}, {}, LOGGED] and there.data_module.validations == [VALIDATION]
    for name, value in here.state.items():
        torch.testing.assert_close(there.state[name], value, rtol=1e-4, atol=2e-3 if bf16 else 1e-6)  # other tiles
    for key in ("train/loss", "val/loss"):
        one, other = ([row[key] for row in each.rows if key in row] for each in (there, here))
        assert len(one) == 1 and one == pytest.approx(other, rel=1e-2 if bf16 else 1e-4)


def spoil(batch):
    batch.image = batch.image.float() * math.inf


def drop(batch):
    raise UserError("a file is gone")


@pytest.mark.parametrize("logged", [1, 9])
def test_non_finite_loss_updates_nothing_and_names_its_step(tmp_path, logged):
    whole = train(tmp_path / "whole", *tiny(), steps=2, val_every=9, log_every=9)
    ended = train(tmp_path / "cut", *tiny(), steps=5, val_every=9, log_every=logged, at=2, fails=spoil)
    plain = train(tmp_path / "plain", *tiny(), cuda=False, steps=5, val_every=9, log_every=1, at=2, fails=spoil)
    assert isinstance(ended.error, NonFiniteLoss) and str(ended.error) == str(plain.error)
    assert str(ended.error).startswith("Step 3: the loss is nan")
    learnt = {name for name, value in whole.state.items() if value.is_floating_point() and "running" not in name}
    assert all(ended.state[name].equal(whole.state[name]) for name in learnt)
    assert not (tmp_path / "cut").exists() or not list((tmp_path / "cut").iterdir())


class NanAtStep3(CrossEntropy):
    steps = 0

    def forward(self, prediction, batch):
        self.steps += 1
        value, parts = super().forward(prediction, batch)
        return (value * math.nan if self.steps == 3 else value), parts


@pytest.mark.parametrize(("loss", "at", "saved"), [(CrossEntropy, 2, True), (NanAtStep3, 3, False)])
def test_failure_between_step_and_reading_saves_only_whole_steps(tmp_path, loss, at, saved, caplog):
    """The file is gone in the step after the one that nobody has read."""
    given = {"steps": 9, "val_every": 9, "log_every": 9, "at": at, "fails": drop}
    with caplog.at_level(logging.WARNING):
        ended = train(tmp_path, tiny()[0], loss(torch.ones(3)), **given)
    assert str(ended.error) == "a file is gone"
    assert bool(list(tmp_path.glob("last*"))) == saved
    assert ("Training stopped after step 2, and that step is saved." in caplog.text) == saved
    assert ("The loss of step 3 was not finite: nothing is saved." in caplog.text) != saved


@pytest.mark.parametrize(("ranks", "stops"), [(1, [True]), (2, [False, True])])
def test_ranks_learn_of_a_stop_at_the_same_step(monkeypatch, ranks, stops):
    """Each reads it with the next step, also the one that was asked: alone it would leave the others waiting."""
    with pretended_cuda():
        engine = pretended_engine()
        model = on_cuda(tiny()[0])
        optimizer = adamw(model, lr=1e-2)
        monkeypatch.setattr(type(engine.accelerator), "num_processes", ranks)
        metrics = MetricsQueue(engine, optimizer)
        finite = torch.ones((), device="cuda")
        found = []
        for step, _ in enumerate(stops):
            values = StepMetrics(step, [], finite, finite, finite)
            found.append(metrics.add(values, read=False, stop_requested=True))
        assert found == stops
        engine.sharded = True
        assert not engine.updates_asynchronously(optimizer)  # never tried with parts of weights


@pytest.mark.parametrize(("gradient", "found_inf"), [(1.0, 0.0), (torch.nan, 1.0)])
def test_device_skips_the_update_of_a_non_finite_gradient(gradient, found_inf):
    with pretended_cuda() as waits:
        engine = pretended_engine()
        model = on_cuda(tiny()[0])
        optimizer = adamw(model, lr=1e-2)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.full_like(parameter, gradient)
        one = Pretended(torch.ones(()))
        waits.take()
        engine.optimizer_step(optimizer, one, one, clip=1.0)
        assert not waits.take()
        assert optimizer.found_inf.item() == found_inf


def test_costs_of_masks_go_to_the_host_in_one_transfer():
    torch.manual_seed(0)
    outputs = MaskOutputs(torch.randn(2, 6, 4), torch.randn(2, 6, 5, 7))
    loss = MaskClassification(torch.rand(3), num_points=64)
    batch = make_batch()
    batch.mask[0][batch.mask[0] == 1] = 0  # a class that one image lacks
    expected, found = [], []
    for cuda in (False, True):
        with pretended_cuda() as waits:
            torch.manual_seed(1)
            outs = MaskOutputs(*(Pretended(part) if cuda else part for part in vars(outputs).values() if part != []))
            prediction = Prediction(outs, (37, 50), (0.9, 1.0), lambda *_: torch.zeros(()), True)
            asked = on_cuda(loss) if cuda else loss
            placed = batch.to(torch.device("cuda")) if cuda else batch
            value, parts = asked(prediction, placed)
            (found if cuda else expected).extend([value, *parts.values()])
            assert waits.take() == (MATCHING if cuda else {})
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.memory, other)


def test_tracking_waits_once_per_batch_and_twice_per_frame():
    def track(cuda):
        torch.manual_seed(0)
        backbone = tiny_vit()
        draw = np.random.default_rng(0)
        frames = [draw.integers(0, 256, (48, 64, 3), np.uint8) for _ in range(4)]
        mask = np.zeros((48, 64), np.uint8)
        mask[8:40, 8:40] = 3
        with pretended_cuda() as waits:
            device = torch.device("cuda" if cuda else "cpu")
            settings = PropagationSettings(short_side=48, radius=2)
            tracker = PropagationTracker(on_cuda(backbone) if cuda else backbone, settings, device=device)
            tracked = tracker.track(frames[:2], [mask, None])
            waits.take()
            tracked += tracker.track(frames[2:], [None, None])
            return tracked, waits.take()

    (here, _), (there, found) = track(False), track(True)
    assert all(np.array_equal(one, other) for one, other in zip(here, there, strict=True))
    assert found == {
        "extensions/tracking/grid/propagator.py check_finite: read": 2,
        "extensions/tracking/grid/propagator.py match: read": 2,
        "extensions/tracking/propagation/masks.py mask: copy to the host": 2,
    }


def test_the_pretended_device_refuses_and_counts():
    with pretended_cuda() as waits:
        one = torch.ones(3, device="cuda")
        with pytest.raises(MixedDevices):
            one + torch.ones(3)
        with pytest.raises(MixedDevices):
            torch.stack([one[0], torch.ones(())])
        with pytest.raises(TypeError, match="can't convert cuda"):
            one.numpy()
        assert (one + 1).device.type == "cuda" and one.cpu().tolist() == [1.0, 1.0, 1.0]
        numbers = torch.ones(3, device="cuda").long()
        waits.take()
        for waiting in (
            lambda: one.sum().item(),
            lambda: bool(one.any()),
            lambda: one.tolist(),
            lambda: one[one > 0],
            lambda: one[[0, 1]],
            lambda: one.__setitem__(numbers, torch.tensor(3.0)),
            lambda: torch.tensor([1.0], device="cuda"),
            lambda: one.new_tensor([1.0]),
            lambda: torch.ones(2).to("cuda", non_blocking=True),
            lambda: torch.ones(2).pin_memory().to("cuda"),
        ):
            waiting()
            assert sum(waits.take().values()) == 1
        torch.ones(2).pin_memory().to("cuda", non_blocking=True)
        one.masked_fill_(one > 0, 2.0)
        one[one > 3] = 1.0
        torch.zeros(2, device="cuda") + torch.ones(()) + one.new_full((), 3)
        assert sum(waits.take().values()) == 0
