"""Figures of what was timed follow from its seconds, and only what is asked for is timed."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from command_line import SMALL
from omegaconf import OmegaConf

from dinoseg.autotune import speed
from dinoseg.autotune.speed import Timed, time_prediction, time_training
from dinoseg.autotune.trial import Trial
from dinoseg.config.plain import plain
from dinoseg.experiment import build

BASE = [*SMALL, "engine.precision=fp32"]


def test_figures_follow_from_seconds():
    figures = Timed("cpu", "fp32", 6, (8, 8), [1.0, 2.0, 3.0, 4.0], 0.5, 7, 100, 1000.0).figures(200.0)
    assert (figures["latency_p50_s"], figures["latency_p95_s"]) == (2.5, pytest.approx(3.85))
    assert figures["images_per_s"] == 2.4 and figures["model_flops_per_s"] == 40.0
    assert figures["share_of_matrix_peak"] == 0.2


def test_a_step_s_operations_are_those_of_all_its_batches(compose, monkeypatch):
    batches = SimpleNamespace(feed=SimpleNamespace(train_batches=lambda start: iter(())))
    monkeypatch.setattr(speed, "regime_of", lambda cfg: lambda *_: batches)
    monkeypatch.setattr(speed, "try_steps", lambda *_, **__: Trial([2.0, 2.0], [1.0, 0.0], peak=5))
    monkeypatch.setattr(speed, "step_flops", lambda cfg, samples, bf16: 10 * samples)
    monkeypatch.setattr(speed, "matrix_peak", lambda *_, **__: 1.0)
    timed = time_training(plain(compose(*BASE, "trainer.accumulate=3")), steps=2, warmup=0, drawn=False)
    assert (timed.images, timed.flops, timed.waited, timed.peak_bytes) == (6, 60, 0.25, 5)


def test_pictures_are_predicted_in_turn_and_timed_once_warm(compose, monkeypatch):
    seen, pictures = [], [np.full((8, 9, 3), value, np.uint8) for value in (0, 1)]
    predictor = SimpleNamespace(ids=lambda given: seen.append(given[0].max()))
    monkeypatch.setattr(speed, "Predictor", lambda *_: predictor)
    monkeypatch.setattr(speed, "_pictures", lambda *_: pictures)
    monkeypatch.setattr(speed, "matrix_peak", lambda *_, **__: 1.0)
    timed = time_prediction(plain(compose(*BASE)), images=3, warmup=2, drawn=False)
    assert seen == [0, 0, 1, 0, 1, 0] and len(timed.seconds) == 3  # the first for its operations
    assert (timed.images, timed.size) == (1, (8, 9))


def test_pictures_are_those_of_the_first_one_s_size(monkeypatch):
    sizes = [(3, 8, 9), (3, 9, 8), (3, 8, 9)]
    data = [{"image": torch.zeros(size, dtype=torch.uint8)} for size in sizes]
    cfg = OmegaConf.create({"trainer": {"feed": "images"}})
    monkeypatch.setattr(build, "dataset", lambda cfg, split: data)
    assert [picture.shape for picture in speed._pictures(cfg, False)] == [(8, 9, 3)] * 2
