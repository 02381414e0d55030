"""What is changed for a memory, with steps that take what a formula says."""

from functools import partial
from types import SimpleNamespace

import pytest
from command_line import SMALL
from mistakes import assert_refused

from dinoseg.experiment.builder import Builder
from dinoseg.extensions.auto import fitting
from dinoseg.extensions.auto.fitting import FitSearch
from dinoseg.extensions.auto.step_bytes import StepBytes
from dinoseg.extensions.auto.target import Target, memory_of
from dinoseg.extensions.auto.training_parts import training_parts
from dinoseg.models.heads.mlp import MlpHead
from dinoseg.utils.errors import UserError

BASE = [*SMALL, "data.batch_size=8", "head=mlp"]  # no BatchNorm


@pytest.fixture
def search(compose, monkeypatch):
    """Return a function that searches a fit on a CPU, where a step needs `take(samples, checkpointing)` bytes."""

    def build(take, memory, *words, world_size=1):
        def step_bytes(parts, loss, *, samples, **_):
            return StepBytes(*[0] * 7, peak=take(samples, parts.checkpointing["backbone"]))

        monkeypatch.setattr(fitting, "step_bytes", step_bytes)
        monkeypatch.setattr(fitting, "LossBytes", lambda *_, **__: None)
        target = {"kind": "cpu", "memory": memory, "bf16": False, "world_size": world_size}
        target = SimpleNamespace(**target, need=lambda step: step.peak)
        return FitSearch(partial(training_parts, Builder(compose(*BASE, *words))), target)

    return build


def take_units(samples, checkpointing, trained=40):
    """Take 10 units for a sample, 4 if it is recomputed, and some for a trained backbone."""
    return samples * (4 if checkpointing else 10) + trained


LORA = ("adapter=lora",)
NORM = (*LORA, "head=linear")  # with BatchNorm
DICE = (*LORA, "loss=ce_dice")  # sums over a batch
HALVES = ("data.batch_size=2", "trainer.accumulate=4")
AGAIN = "backbone.checkpointing=true"


@pytest.mark.parametrize(
    ("memory", "recipe", "devices", "words"),
    [
        # the cheapest change is tried first
        (120, LORA, 1, ""),
        (119, LORA, 1, "data.batch_size=4 trainer.accumulate=2"),
        (79, LORA, 1, "data.batch_size=2 trainer.accumulate=4"),
        (50, LORA, 1, "data.batch_size=1 trainer.accumulate=8"),
        (49, LORA, 1, f"{AGAIN} data.batch_size=2 trainer.accumulate=4"),
        (44, LORA, 1, f"{AGAIN} data.batch_size=1 trainer.accumulate=8"),
        (43, LORA, 1, None),
        # checkpointing comes before splitting what BatchNorm or a loss sums over
        (79, NORM, 1, AGAIN),
        (60, NORM, 1, f"{AGAIN} data.batch_size=4 trainer.accumulate=2"),
        (120, (*NORM, *HALVES), 1, ""),
        (79, DICE, 1, AGAIN),
        (79, (*DICE, *HALVES), 1, ""),
        # the batch is divided equally among devices
        (60, LORA, 4, ""),
        (59, LORA, 4, "data.batch_size=4 trainer.accumulate=2"),
        (49, LORA, 4, AGAIN),
        (69, (*LORA, "data.batch_size=12"), 4, "data.batch_size=4 trainer.accumulate=3"),  # not 6, which 4 do not share
    ],
)
def test_smallest_change_that_fits_is_found(search, memory, recipe, devices, words):
    found = search(take_units, memory, *recipe, world_size=devices).find_fit()
    assert (found and " ".join(map(str, found.changes))) == words


def test_no_checkpointing_without_a_larger_batch(search):
    found = search(lambda samples, checkpointing: samples * (9 if checkpointing else 10) + 40, 80, *NORM).find_fit()
    assert " ".join(map(str, found.changes)) == "data.batch_size=4 trainer.accumulate=2"


def test_a_frozen_backbone_has_nothing_to_compute_again(search):
    assert search(partial(take_units, trained=0), 9, "adapter=frozen").find_fit() is None


def test_each_device_gets_the_minimum_batch_of_the_head(search, monkeypatch):
    monkeypatch.setattr(MlpHead, "min_batch_size", 2)
    found = search(take_units, 50, *LORA).find_fit()
    assert " ".join(map(str, found.changes)) == f"{AGAIN} data.batch_size=2 trainer.accumulate=4"
    assert search(take_units, 45, *LORA, world_size=2).find_fit() is None


def test_no_step_is_estimated_twice(search):
    tried = []

    def take(samples, checkpointing):
        tried.append((samples, checkpointing))
        return 10

    assert search(take, 9, *LORA, "data.batch_size=1").find_fit() is None
    assert tried == [(1, False), (1, True)]


@pytest.mark.parametrize(
    ("recipe", "steps"),
    [
        (LORA, [(16, False), (1, False), (4, False), (8, False)]),
        (NORM, [(16, False), (1, True), (4, True), (8, True), (16, True)]),
    ],
)
def test_search_ends_with_the_first_best_change(search, caplog, recipe, steps):
    tried = []

    def take(samples, checkpointing):
        tried.append((samples, checkpointing))
        return take_units(samples, checkpointing)

    caplog.set_level("INFO")
    assert search(take, 125, *recipe, "data.batch_size=16").find_fit()
    assert tried == steps and "data.batch_size=4 trainer.accumulate=4 ..." in caplog.text


def test_frozen_statistics_do_not_restrict_the_batch(search):
    fits = search(take_units, 1, "head=linear")
    fits._model.eval()
    assert not fits._name_bound_parts()


HARD = "{_target_: dinoseg.losses.cross_entropy.CrossEntropy, _partial_: true, hard_fraction: 0.1}"
LATE = ("~loss.criterion.terms.dice", "~loss.criterion.factors.dice")
LATE += (f"+loss.criterion.terms.hard={HARD}", "+loss.criterion.factors.hard=1.0")


@pytest.mark.parametrize("late", [(), pytest.param(LATE, marks=pytest.mark.heavy)], ids=["sums", "late divisors"])
def test_loss_that_sums_over_a_batch_is_named_in_the_reason(search, late):
    (_, parts) = search(take_units, 60, *DICE, "head=linear", *late).find_fit().changes
    named = "BatchNorm computes its statistics and loss=ce_dice computes its sums per micro-batch, so results differ"
    assert named in parts.reason and "at random" not in parts.reason


def test_step_bytes_uses_precision_and_world_size_of_the_target(compose, monkeypatch):
    asked = []
    monkeypatch.setattr(fitting, "LossBytes", lambda parts, **how: asked.append(how))
    monkeypatch.setattr(fitting, "step_bytes", lambda parts, loss, **how: asked.append(how) or StepBytes(*[0] * 8))
    recipe = partial(training_parts, Builder(compose(*BASE, "trainer.accumulate=3")))
    assert FitSearch(recipe, Target("cuda", 2**20, bf16=True, world_size=2)).as_it_is.need == 2**30
    first = {"bf16": True, "accelerator": True}
    second = {"samples": 4, "accumulate": 3, "bf16": True, "world_size": 2}
    assert asked == [first, second]


def test_smallest_fit_is_the_one_of_the_least_memory(search):
    # recomputing costs more here
    fits = search(lambda samples, checkpointing: samples * (20 if checkpointing else 10), 1)
    assert fits.find_fit() is None
    assert fits.smallest.need == 10 and not fits.smallest.parts.checkpointing["backbone"]


def test_unsupported_changes_are_skipped_and_bad_recipes_raise(search):
    refused = []

    def take(samples, checkpointing):
        if checkpointing or refused:
            raise UserError("it cannot")
        return samples

    fits = search(take, 0, *LORA)
    assert fits.as_it_is.need > fits.target.memory and fits.find_fit() is None
    assert fits.smallest.parts.batch_size == 1
    refused.append(True)
    assert_refused(lambda: search(take, 0, *LORA), "it cannot")


@pytest.mark.parametrize(
    ("text", "amount"),
    [("24GiB", 24 * 2**30), ("24GB", 24 * 10**9), ("1.5 GiB", 3 * 2**29), ("800MiB", 800 * 2**20), ("2tb", 2 * 10**12)],
)
def test_amounts_are_read_with_their_units(text, amount):
    assert memory_of(text) == amount


@pytest.mark.parametrize("text", ["24", "24G", "GiB", "-1GiB", "0GB", "nan GB", "1e3GiB", "24 GiB free", "", "True"])
def test_other_amounts_are_refused(text):
    assert_refused(lambda: memory_of(text), "give an amount with its unit, such as 24GiB")


def test_memory_need_includes_overhead_beyond_tensors():
    step = StepBytes(*[0] * 7, peak=10**9)
    assert Target("cuda", 0, bf16=True).need(step) == 1_080_000_000 + 2**30
    assert Target("cpu", 0, bf16=True).need(step) == 1_750_000_000 + 3 * 2**27


def test_changed_config_is_a_copy(compose):
    cfg = compose(*BASE)
    change = fitting.Change({"adapter": "lora", "adapter.blocks": 1, "data.batch_size": 2}, "")
    new = Builder(cfg).with_options(change.words)
    assert [new.value(f"adapter.{key}") for key in ("blocks", "rank")] == [1, 16]
    assert (new.options["adapter"], new.value("data.batch_size")) == ("lora", 2)
    assert (cfg.choices.adapter, cfg.data.batch_size) == ("full", 8)
    assert str(change) == "adapter=lora adapter.blocks=1 data.batch_size=2"
