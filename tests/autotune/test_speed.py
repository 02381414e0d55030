"""Figures of what was timed follow from its seconds, and only what is asked for is timed."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from command_line import SMALL

from dinoseg.autotune import speed
from dinoseg.autotune.speed import SpeedMeasurement, first_images, time_prediction, time_training
from dinoseg.autotune.trial import Trial
from dinoseg.config.nodes import instantiate
from dinoseg.experiment.builder import Builder
from dinoseg.experiment.step import training_parts

BASE = [*SMALL, "engine.precision=fp32"]


def test_figures_follow_from_seconds():
    figures = SpeedMeasurement("cpu", "fp32", 6, (8, 8), [1.0, 2.0, 3.0, 4.0], 0.5, 7, 100, 1000.0).figures(200.0)
    assert (figures["latency_p50_s"], figures["latency_p95_s"]) == (2.5, pytest.approx(3.85))
    assert figures["images_per_s"] == 2.4 and figures["model_flops_per_s"] == 40.0
    assert figures["share_of_matrix_peak"] == 0.2


def test_a_step_s_operations_are_those_of_all_its_batches(compose, monkeypatch):
    monkeypatch.setattr(speed, "try_steps", lambda *_, **__: Trial([2.0, 2.0], [1.0, 0.0], peak=5))
    monkeypatch.setattr(speed, "step_flops", lambda parts, samples, bf16: 10 * samples)
    monkeypatch.setattr(speed, "matrix_peak", lambda *_, **__: 1.0)
    cfg = compose(*BASE, "trainer.accumulate=3")
    timed = time_training(training_parts(Builder(cfg)), instantiate(cfg.engine), iter(()), steps=2, warmup=0)
    assert (timed.images, timed.flops, timed.waited, timed.peak_bytes) == (6, 60, 0.25, 5)


def test_pictures_are_predicted_in_turn_and_timed_once_warm(compose, monkeypatch):
    seen, pictures = [], [np.full((8, 9, 3), value, np.uint8) for value in (0, 1)]
    predictor = SimpleNamespace(ids=lambda given: seen.append(given[0].max()))
    monkeypatch.setattr(speed, "Predictor", lambda *_: predictor)
    monkeypatch.setattr(speed, "matrix_peak", lambda *_, **__: 1.0)
    cfg = compose(*BASE)
    make, engine = training_parts(Builder(cfg)).model, instantiate(cfg.engine)
    timed = time_prediction(make, engine, instantiate(cfg.inference), pictures, count=3, warmup=2)
    assert seen == [0, 0, 1, 0, 1, 0] and len(timed.seconds) == 3  # the first for its operations
    assert (timed.images, timed.size) == (1, (8, 9))


def test_images_have_the_size_of_the_first_one():
    sizes = [(3, 8, 9), (3, 9, 8), (3, 8, 9)]
    data = [{"image": torch.zeros(size, dtype=torch.uint8)} for size in sizes]
    assert [image.shape for image in first_images(data)] == [(8, 9, 3)] * 2
