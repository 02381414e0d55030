"""Steps that are tried are timed without those before them, and leave nothing."""

from functools import partial
from itertools import count, repeat
from types import SimpleNamespace

from command_line import SMALL

from dinoseg import build
from dinoseg.config.nodes import instantiate
from dinoseg.config.plain import plain
from dinoseg.costs import trial
from dinoseg.costs.stand_in import drawn_batch
from dinoseg.costs.trial import drawn_steps, try_steps

BASE = [*SMALL, "engine.precision=fp32", "resolution.crop=[16,16]"]


def test_steps_are_timed_with_their_batches_once_warm(compose, monkeypatch):
    cfg = compose(*BASE, "trainer.accumulate=2", "trainer.save_every=1")
    monkeypatch.setattr(trial, "time", SimpleNamespace(perf_counter=count().__next__))  # each look takes a second
    monkeypatch.setattr(trial, "held_memory", lambda device: 30)
    monkeypatch.setattr(trial, "peak_memory", lambda device: 70)
    saved = []
    monkeypatch.setattr(trial.Checkpoints, "save", lambda *_: saved.append(1))
    make = partial(build.model, cfg, untrained=True)
    found = try_steps(cfg, make, instantiate(cfg.engine), repeat(drawn_batch(cfg, 2)), steps=2, warmup=1)
    assert (found.seconds, found.waited) == ([5, 5], [2, 2]) and (found.before, found.peak) == (30, 40)
    assert len(saved) == 1  # the end is that of a training that is stopped


def test_a_part_of_a_batch_is_tried_on_one_device(compose):
    assert len(drawn_steps(plain(compose(*BASE, "engine.devices=2")), 1, steps=1).seconds) == 1


def test_a_backbone_that_rests_at_first_is_tried_as_it_learns_later(compose):
    cfg = compose(*BASE, "optim.optimizer.backbone_begin=0.9")
    learnt = []

    def make():
        model = build.model(cfg, untrained=True)
        model.backbone.register_forward_hook(
            lambda part, _, maps: learnt.append((part.training, maps[0].requires_grad))
        )
        return model

    try_steps(cfg, make, instantiate(cfg.engine), repeat(drawn_batch(cfg, 2)), steps=1, warmup=1)
    assert learnt == [(True, True)] * 2
