"""Steps that are tried are timed without those before them, and leave nothing."""

from dataclasses import replace
from itertools import count, repeat
from types import SimpleNamespace

from command_line import SMALL

from dinoseg.autotune import trial
from dinoseg.autotune.random_batch import random_batch
from dinoseg.autotune.timing import _later_median
from dinoseg.autotune.trial import try_steps
from dinoseg.config.nodes import instantiate
from dinoseg.experiment.builder import Builder
from dinoseg.experiment.step import training_parts

BASE = [*SMALL, "engine.precision=fp32", "resolution.crop=[16,16]"]


def test_steps_are_timed_with_their_batches_once_warm(compose, monkeypatch):
    cfg = compose(*BASE, "trainer.accumulate=2", "trainer.save_every=1")
    clock = SimpleNamespace(perf_counter=count().__next__, monotonic=lambda: 0.0)  # each reading takes a second
    monkeypatch.setattr(trial, "time", clock)
    monkeypatch.setattr(trial, "used_memory", lambda device: 30)
    monkeypatch.setattr(trial, "peak_memory", lambda device: 70)
    saved = []
    monkeypatch.setattr(trial.Checkpointer, "save", lambda *_: saved.append(1))
    parts = training_parts(Builder(cfg))
    batches = repeat(random_batch(parts, 2))
    found = try_steps(parts, instantiate(cfg.engine), batches, steps=2, warmup=1)
    assert (found.seconds, found.waited) == ([5, 5], [2, 2]) and (found.before, found.peak) == (30, 40)
    assert len(saved) == 1  # the end is that of a training that is stopped


def test_trial_runs_for_at_least_the_given_seconds(compose, monkeypatch):
    cfg = compose(*BASE)
    clock = SimpleNamespace(perf_counter=count().__next__, monotonic=lambda: 0.0)  # a step takes 3 s
    monkeypatch.setattr(trial, "time", clock)
    parts = training_parts(Builder(cfg))
    for lasting, timed in ((0, 2), (6, 2), (7, 3), (30, 10), (1e9, 99)):  # beside the one that warms up
        batches = repeat(random_batch(parts, 2))
        found = try_steps(parts, instantiate(cfg.engine), batches, steps=2, warmup=1, lasting=lasting)
        assert (len(found.seconds), len(found.waited)) == (timed, timed), lasting


def test_step_time_is_the_median_of_the_later_half():
    assert _later_median([9.0]) == 9 and _later_median([9.0, 2.0]) == 2 and _later_median([9.0, 3.0, 1.0]) == 2
    assert _later_median([9.0, 9.0, 9.0, 1.0, 5.0, 2.0]) == 2


def test_backbone_frozen_at_first_is_timed_as_trained(compose, caplog, monkeypatch):
    cfg = compose(*BASE, "optim.optimizer.freeze_backbone_until=0.9")
    trained, parts = [], training_parts(Builder(cfg))

    def build_model():
        model = parts.model()
        model.backbone.register_forward_hook(
            lambda part, _, maps: trained.append((part.training, maps[0].requires_grad))
        )
        return model

    parts_of_model = replace(parts, model=build_model)
    try_steps(parts_of_model, instantiate(cfg.engine), repeat(random_batch(parts, 2)), steps=2, warmup=1)
    assert trained == [(True, True)] * 3
    assert not caplog.records
