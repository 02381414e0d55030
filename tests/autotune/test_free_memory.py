"""What has to change so that a step fits the memory of each device; what a step needs is made up."""

import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
from command_line import SMALL

from dinoseg.autotune.memory import Memory
from dinoseg.config.nodes import instantiate
from dinoseg.experiment.builder import Builder
from dinoseg.experiment.step import training_parts
from dinoseg.inference.memory import OutOfMemory


@pytest.fixture
def asked(compose, monkeypatch):
    """Return a function that gives memory of which so much is free, and a config whose samples need what `of` says."""
    monkeypatch.setattr("dinoseg.autotune.target.Target.need", lambda target, step: step)

    def ask(of, free, *words, given=(), ranks=1):
        monkeypatch.setattr("dinoseg.autotune.memory.free_bytes", lambda device: free)
        monkeypatch.setattr(
            "dinoseg.autotune.fitting.step_bytes", lambda parts, loss, *, samples, **_: of(parts, samples)
        )
        cfg = compose("mode=train", *SMALL, "data.classes=[a,b]", "data.batch_size=4", *words)
        engine, recipe = instantiate(cfg.engine, instead={"devices": 1}), partial(training_parts, Builder(cfg))
        return Memory(engine, frozenset(given), recipe({}).outline().backbone, ranks, cfg.engine.devices), recipe

    return ask


def needs(parts, samples):
    return 25 * samples


def fits(memory, recipe):
    return memory.suffices(recipe)


def test_a_step_fits_what_is_free_to_the_byte_as_each_device_has_its_share(asked):
    assert fits(*asked(needs, 100)) and not fits(*asked(needs, 99))
    assert fits(*asked(needs, 50, "engine.devices=2")) and not fits(*asked(needs, 49, "engine.devices=2"))
    assert fits(*asked(needs, 100, "engine.devices=2", ranks=2))  # which share a machine's memory
    assert not fits(*asked(needs, 99, "engine.devices=2", ranks=2))


def test_what_fits_to_the_byte_stays_as_it_is_and_is_counted_in_the_precision_it_has(asked):
    memory, recipe = asked(needs, 100, "engine.precision=fp32")
    assert memory.changes(recipe) == [] and not memory._search(recipe)[0].target.bf16
    memory, recipe = asked(needs, 100, "engine.precision=bf16")
    assert memory._search(recipe)[0].target.bf16


def test_ample_memory_is_known_without_an_exact_estimate(asked):
    memory, recipe = asked(lambda *_: pytest.fail("estimated"), 2**32)
    assert memory.suffices(recipe) and memory.changes(recipe) == []


def test_what_is_not_known_fits(asked):
    memory, recipe = asked(needs, 1)
    memory = replace(memory, engine=SimpleNamespace(device=memory.engine.device, sharded=True))
    assert memory.suffices(recipe) and memory.changes(recipe) == []
    assert fits(*asked(needs, math.inf))


def test_nothing_that_was_typed_changes(asked):
    memory, recipe = asked(needs, 30)
    assert memory.changes(recipe)[0].words == {"data.batch_size": 1, "trainer.accumulate": 4}
    memory, recipe = asked(needs, 30, given={"data.batch_size"})
    assert memory.changes(recipe) == []

    def of(parts, samples):
        return 99 if parts.takes_blocks else 101

    memory, recipe = asked(of, 100, "adapter=full")
    assert memory.changes(recipe)[0].words == {"adapter": "lora"}
    memory, recipe = asked(of, 100, "adapter=full", given={"adapter"})
    with pytest.raises(OutOfMemory, match="A training step needs at least"):
        memory.changes(recipe)
