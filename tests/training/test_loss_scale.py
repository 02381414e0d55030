"""Training in float16: losses are scaled, overflows skip a step, and a run resumes exactly."""

import math
from functools import partial

import pytest
import torch
from pretended_cuda import pretended_cuda
from test_cuda_paths import LOGGED, VALIDATION, tiny, train
from test_mps import train_on_mps

from dinoseg.losses.cross_entropy import CrossEntropy
from dinoseg.training.checkpoint import read
from dinoseg.training.engine import Engine
from dinoseg.training.loss_scale import LossScale
from dinoseg.training.step import NonFiniteLoss
from dinoseg.utils.precision import compute_dtype

CPU = torch.device("cpu")
turing = partial(pretended_cuda, capability=(7, 5))
train_in_fp16 = partial(train, precision="auto", device=turing)


class Overflowing(CrossEntropy):
    """A loss whose gradients are infinite in some calls, and whose value is finite."""

    def __init__(self, *calls):
        super().__init__(torch.ones(3))
        self.calls, self.count = calls, 0

    def forward(self, prediction, batch):
        value, parts = super().forward(prediction, batch)
        self.count += 1
        if self.count in self.calls:
            value.register_hook(lambda gradient: gradient * math.inf)
        return value, parts


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((9, 0), torch.bfloat16), ((7, 5), torch.float16), ((7, 0), torch.float16), ((6, 1), torch.float32)],
)
def test_auto_chooses_float16_on_gpus_without_bfloat16(capability, expected):
    with pretended_cuda(capability):
        assert compute_dtype("auto", torch.device("cuda")) == expected


def test_float16_step_never_waits_and_trains_like_float32(tmp_path):
    half = train_in_fp16(tmp_path / "half", *tiny(), clip=0.5, plain=True)
    whole = train(tmp_path / "whole", *tiny(), clip=0.5, plain=True)
    assert half.error is None and half.data_module.validations == [VALIDATION]
    scaled = {"training/trainer.py log_step: read": 1}
    assert half.data_module.steps == [{"training/engine.py backward: read": 1}, {}, LOGGED | scaled]
    for name, value in whole.state.items():
        torch.testing.assert_close(half.state[name], value, rtol=1e-2, atol=1e-3)
    # 2 x 16 x 24 pixels, two columns ignored, of weights up to 2: the first power of two that is no less
    assert next(row["train/loss_scale"] for row in half.rows if "train/loss_scale" in row) == 2.0**16 / 1024


def test_an_overflow_skips_the_step_and_halves_the_scale(tmp_path):
    settings = {"steps": 1, "val_every": 9, "log_every": 1}
    start = train_in_fp16(tmp_path / "0", tiny()[0], Overflowing(1), **settings)
    skipped = train_in_fp16(tmp_path / "1", tiny()[0], Overflowing(), **settings)
    on_mps = train_on_mps(tmp_path / "2", tiny()[0], Overflowing(1), precision="fp16", **settings)
    weights = {name: value for name, value in tiny()[0].state_dict().items() if "running" not in name}
    for run in (start, on_mps):
        assert run.error is None and run.step == 1
        assert all(run.state[name].equal(value) for name, value in weights.items() if value.is_floating_point())
    assert not all(skipped.state[name].equal(value) for name, value in weights.items())
    scale, steady = (read(tmp_path / "0" / "last.safetensors").part("loss_scale")[name] for name in ("value", "steady"))
    assert (scale, steady) == (2.0**15 / 1024, -1.0)


def test_repeated_infinite_loss_or_gradient_ends_the_training(tmp_path, monkeypatch):
    class Infinite(CrossEntropy):
        def forward(self, prediction, batch):
            value, parts = super().forward(prediction, batch)
            return value * math.inf, parts

    ended = train_in_fp16(tmp_path / "loss", tiny()[0], Infinite(torch.ones(3)), steps=3, val_every=9, log_every=1)
    assert isinstance(ended.error, NonFiniteLoss) and str(ended.error).startswith("Step 1: the loss is inf")
    assert "engine.precision=fp32" in str(ended.error)
    monkeypatch.setattr("dinoseg.training.loss_scale._MAX_OVERFLOWS", 2)
    ended = train_in_fp16(tmp_path / "grad", tiny()[0], Overflowing(*range(9)), steps=9, val_every=9, log_every=1)
    assert isinstance(ended.error, NonFiniteLoss) and str(ended.error).startswith("Step 3: the loss is")


def test_a_run_in_float16_resumes_exactly(tmp_path):
    options = {"val_every": 2, "log_every": 2, "accumulate": 2}  # whose batches have one scale
    whole = train_in_fp16(tmp_path / "whole", tiny()[0], Overflowing(4), steps=4, **options)
    train_in_fp16(tmp_path / "cut", tiny()[0], Overflowing(4), steps=2, **options)
    start = read(tmp_path / "cut" / "last.safetensors")
    assert start.part("loss_scale").keys() == {"value", "steady"}
    rest = train_in_fp16(tmp_path / "cut", tiny()[0], Overflowing(), steps=4, start=start, **options)
    assert whole.error is None and whole.step == 4
    assert rest.error is None and all(value.equal(rest.state[name]) for name, value in whole.state.items())
    ends = [read(tmp_path / name / "last.safetensors").part("loss_scale") for name in ("whole", "cut")]
    assert ends[0] == ends[1]
    other = train(tmp_path / "fp32", *tiny(), steps=3, val_every=9, log_every=9, start=start)
    assert other.error is None and not read(tmp_path / "fp32" / "last.safetensors").part("loss_scale")


def test_scale_begins_with_a_labelled_batch_and_grows_if_steady():
    scale = LossScale()
    scale.begin(0.0, CPU)
    scale.update(torch.tensor(False))
    assert not scale.started and not scale.state() and scale.value.isfinite()
    scale.begin(1000.0, CPU)
    assert scale.started and (scale.value, scale.steady) == (64.0, 0)
    for overflow, value, steady in [(True, 32.0, -1), (True, 16.0, -2), (False, 16.0, 1), (True, 8.0, -1)]:
        scale.update(torch.tensor(overflow))
        assert (scale.value, scale.steady) == (value, steady)
    for _ in range(2000):
        scale.update(torch.tensor(False))
    assert (scale.value, scale.steady) == (16.0, 0)


def test_tf32_is_chosen_where_there_is_any(monkeypatch, caplog):
    chosen = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", chosen.append)
    assert not Engine("cpu", "fp32", tf32=True).tf32
    assert caplog.messages == ["engine.tf32=true has no effect: this device (cpu) has no TF32."]
    monkeypatch.setattr("dinoseg.training.engine.has_tf32", lambda _: True)
    assert Engine("cpu", "fp32", tf32=True).tf32 and len(caplog.messages) == 1
    assert chosen == ["highest", "high"]
