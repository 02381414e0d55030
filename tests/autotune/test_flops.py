"""Operations of a step are those that can be counted by hand, whatever is computed again."""

from itertools import count
from types import SimpleNamespace

import pytest
import torch
from command_line import SMALL
from torch.utils.flop_counter import FlopCounterMode

from dinoseg.autotune.random_batch import random_batch
from dinoseg.autotune.step_bytes import step_flops
from dinoseg.experiment.builder import Builder
from dinoseg.experiment.step import training_parts
from dinoseg.modes import bench
from dinoseg.modes.bench import matrix_peak

BASE = [*SMALL, "engine.precision=fp32", "resolution.crop=[64,48]"]


def test_step_flops_equal_a_count_by_hand(compose):
    """Two blocks of width 24 and hidden width 48 on 8 x 6 cells and five tokens beside them."""
    cells, width, hidden, samples = 48, 24, 48, 3
    tokens = cells + 5
    block = 2 * tokens * (4 * width**2 + 2 * width * hidden) + 2 * 2 * tokens**2 * width
    patches, head = 2 * cells * 3 * 8 * 8 * width, 2 * cells * width * 2
    frozen = step_flops(
        training_parts(Builder(compose(*BASE, "adapter=frozen", "head.layers=[-1]"))), samples, bf16=False
    )
    forward = samples * (patches + 2 * block + head)
    assert frozen == pytest.approx(forward + 2 * samples * head, rel=0.02)
    words = (*BASE, "adapter=full", "head.layers=[-1]")
    parts = training_parts(Builder(compose(*words)))
    whole = step_flops(parts, samples, bf16=False)
    assert whole == pytest.approx(3 * forward, rel=0.1)  # attention goes backward in five products for two
    assert step_flops(parts, 2 * samples, bf16=False) == 2 * whole


@pytest.mark.parametrize(
    "words",
    [
        ("adapter=lora", "head=eomt", "head.blocks=1", "loss=mask_classification"),
    ],
)
def test_step_flops_equal_a_count_over_a_real_step(compose, words):
    parts = training_parts(Builder(compose(*BASE, *words)))
    model, batch, loss = parts.model().train(), random_batch(parts, 2), parts.loss()
    with FlopCounterMode(display=False) as forward:
        prediction = model(batch.image)
    value, _ = loss(prediction, batch)
    with FlopCounterMode(display=False) as backward:
        value.backward()
    assert step_flops(parts, 2, bf16=False) == forward.get_total_flops() + backward.get_total_flops() > 1_000_000


def test_matrix_peak_of_a_device_is_measured(monkeypatch):
    assert 1e8 < matrix_peak(torch.device("cpu"), torch.float32) < 1e15
    monkeypatch.setattr(bench, "_SIDES", {"cpu": 8})
    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=count().__next__))  # a second for each product
    assert matrix_peak(torch.device("cpu"), torch.bfloat16) == 2 * 8**3
