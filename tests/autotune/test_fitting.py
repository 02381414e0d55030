"""What is changed for a memory, with steps that take what a formula says."""

from functools import partial
from types import SimpleNamespace

import pytest
from command_line import SMALL

from dinoseg.autotune import fitting
from dinoseg.autotune.fitting import FitSearch
from dinoseg.autotune.step_bytes import StepBytes
from dinoseg.autotune.target import Target, memory_of
from dinoseg.experiment.builder import Builder
from dinoseg.experiment.step import training_parts
from dinoseg.models.heads.mlp import MlpHead
from dinoseg.utils.errors import UserError

BASE = [*SMALL, "data.batch_size=8", "head=mlp"]  # no BatchNorm
UNIT = 2**20


def recipe_of(cfg):
    return partial(training_parts, Builder(cfg))


@pytest.fixture
def changes(compose, monkeypatch):
    """Fit a recipe to a memory on a CPU: a sample takes 10 units, 4 if recomputed, and a trained backbone 40."""

    def take(parts, loss, *, samples, accumulate, bf16, world_size):
        each = 4 if parts.checkpointing["backbone"] else 10
        is_frozen = parts.outline().backbone.first_trained is None
        return StepBytes(*[0] * 7, peak=(samples * each + (0 if is_frozen else 40)) * UNIT)

    monkeypatch.setattr(fitting, "step_bytes", take)
    monkeypatch.setattr(fitting, "LossBytes", lambda *_, **__: None)

    def run(memory, *words, world_size=1, **options):
        target = SimpleNamespace(
            kind="cpu", memory=memory * UNIT, bf16=False, world_size=world_size, need=lambda step: step.peak
        )
        found = FitSearch(recipe_of(compose(*BASE, *words)), target, **options).find_fit()
        return None if found is None else found.changes

    return run


@pytest.fixture
def fit(changes):
    """Return the words that fit a recipe to a memory."""

    def run(*args, **options):
        found = changes(*args, **options)
        return None if found is None else " ".join(map(str, found))

    return run


@pytest.mark.parametrize(
    ("memory", "words"),
    [
        (120, ""),
        (119, "data.batch_size=4 trainer.accumulate=2"),
        (79, "data.batch_size=2 trainer.accumulate=4"),
        (50, "data.batch_size=1 trainer.accumulate=8"),
        (49, "backbone.checkpointing=true data.batch_size=2 trainer.accumulate=4"),
        (44, "backbone.checkpointing=true data.batch_size=1 trainer.accumulate=8"),
        (43, None),
    ],
)
def test_cheapest_change_is_tried_first(fit, memory, words):
    assert fit(memory, "adapter=lora") == words


def test_no_step_is_estimated_twice(compose, monkeypatch):
    tried = []

    def take(parts, loss, *, samples, **_):
        tried.append((samples, parts.checkpointing["backbone"]))
        return StepBytes(*[0] * 7, peak=10)

    monkeypatch.setattr(fitting, "step_bytes", take)
    monkeypatch.setattr(fitting, "LossBytes", lambda *_, **__: None)
    target = SimpleNamespace(kind="cpu", memory=9, bf16=False, world_size=1, need=lambda step: step.peak)
    assert FitSearch(recipe_of(compose(*BASE, "adapter=lora", "data.batch_size=1")), target).find_fit() is None
    assert tried == [(1, False), (1, True)]


def test_checkpointing_is_tried_before_splitting_batch_norm(fit):
    assert fit(79, "adapter=lora", "head=linear") == "backbone.checkpointing=true"
    assert (
        fit(60, "adapter=lora", "head=linear") == "backbone.checkpointing=true data.batch_size=4 trainer.accumulate=2"
    )
    assert fit(120, "adapter=lora", "head=linear", "data.batch_size=2", "trainer.accumulate=4") == ""


def test_frozen_statistics_do_not_restrict_the_batch(compose):
    fits = FitSearch(recipe_of(compose(*BASE, "head=linear")), Target("cpu", UNIT, bf16=False))
    fits._model.eval()
    assert not fits._name_bound_parts()


def test_loss_that_sums_over_a_batch_is_split_last_and_named(fit, changes):
    words = ("adapter=lora", "loss=ce_dice")
    assert fit(79, *words) == "backbone.checkpointing=true"
    assert fit(79, *words, "data.batch_size=2", "trainer.accumulate=4") == ""
    (_, parts) = changes(60, *words, "head=linear")
    named = "BatchNorm computes its statistics and loss=ce_dice computes its sums per micro-batch, so results differ"
    assert named in parts.reason and "at random" not in parts.reason


def test_sum_with_late_divisors_is_named_in_the_reason(changes):
    words = ["loss=ce_dice", "~loss.criterion.terms.dice", "~loss.criterion.factors.dice"]
    hard = "{_target_: dinoseg.losses.cross_entropy.CrossEntropy, _partial_: true, hard_fraction: 0.1}"
    words += [f"+loss.criterion.terms.hard={hard}", "+loss.criterion.factors.hard=1.0"]
    (_, parts) = changes(60, "adapter=lora", "head=linear", *words)
    assert "loss=ce_dice computes its sums per micro-batch" in parts.reason


def test_a_frozen_backbone_has_nothing_to_compute_again(fit):
    assert fit(9, "adapter=frozen") is None


def test_batch_is_divided_equally_among_devices(fit):
    assert fit(60, "adapter=lora", world_size=4) == ""
    assert fit(59, "adapter=lora", world_size=4) == "data.batch_size=4 trainer.accumulate=2"
    assert fit(49, "adapter=lora", world_size=4) == "backbone.checkpointing=true"
    words = ("adapter=lora", "data.batch_size=12")
    assert fit(69, *words, world_size=4) == "data.batch_size=4 trainer.accumulate=3"  # not 6, which 4 do not share


def test_each_device_gets_the_minimum_batch_of_the_head(fit, monkeypatch):
    monkeypatch.setattr(MlpHead, "min_batch_size", 2)
    assert fit(50, "adapter=lora") == "backbone.checkpointing=true data.batch_size=2 trainer.accumulate=4"
    assert fit(45, "adapter=lora", world_size=2) is None


def test_step_bytes_uses_precision_and_world_size_of_the_target(compose, monkeypatch):
    asked = []
    monkeypatch.setattr(fitting, "LossBytes", lambda parts, **how: asked.append(how))
    monkeypatch.setattr(fitting, "step_bytes", lambda parts, loss, **how: asked.append(how) or StepBytes(*[0] * 8))
    words = (*BASE, "trainer.accumulate=3")
    assert FitSearch(recipe_of(compose(*words)), Target("cuda", UNIT, bf16=True, world_size=2)).as_it_is.need == 2**30
    first, second = {"bf16": True, "accelerator": True}, {"samples": 4, "accumulate": 3, "bf16": True, "world_size": 2}
    assert asked == [first, second]


def test_smallest_fit_is_the_one_of_the_least_memory(compose, monkeypatch):
    def take(parts, loss, *, samples, **_):
        each = 20 if parts.checkpointing["backbone"] else 10  # recomputing costs more here
        return StepBytes(*[0] * 7, peak=samples * each * UNIT)

    monkeypatch.setattr(fitting, "step_bytes", take)
    monkeypatch.setattr(fitting, "LossBytes", lambda *_, **__: None)
    target = SimpleNamespace(kind="cpu", memory=UNIT, bf16=False, world_size=1, need=lambda step: step.peak)
    search = FitSearch(recipe_of(compose(*BASE)), target)
    assert search.find_fit() is None
    assert search.smallest.need == 10 * UNIT and not search.smallest.parts.checkpointing["backbone"]


def test_unsupported_changes_are_skipped_and_bad_recipes_raise(compose, monkeypatch):
    refused = []

    def take(parts, loss, *, samples, **_):
        if parts.checkpointing["backbone"] or refused:
            raise UserError("it cannot")
        return StepBytes(*[0] * 7, peak=samples * UNIT)

    monkeypatch.setattr(fitting, "step_bytes", take)
    monkeypatch.setattr(fitting, "LossBytes", lambda *_, **__: None)
    cfg, target = compose(*BASE, "adapter=lora"), Target("cpu", UNIT, bf16=False)
    fits = FitSearch(recipe_of(cfg), target)
    assert fits.as_it_is.need > fits.target.memory and fits.find_fit() is None
    assert fits.smallest.parts.batch_size == 1
    refused.append(True)
    with pytest.raises(UserError, match="it cannot"):
        FitSearch(recipe_of(cfg), target).find_fit()


@pytest.mark.parametrize(
    ("text", "amount"),
    [("24GiB", 24 * 2**30), ("24GB", 24 * 10**9), ("1.5 GiB", 3 * 2**29), ("800MiB", 800 * 2**20), ("2tb", 2 * 10**12)],
)
def test_amounts_are_read_with_their_units(text, amount):
    assert memory_of(text) == amount


@pytest.mark.parametrize("text", ["24", "24G", "GiB", "-1GiB", "0GB", "nan GB", "1e3GiB", "24 GiB free", "", "True"])
def test_other_amounts_are_refused(text):
    with pytest.raises(UserError, match="give an amount with its unit, such as 24GiB"):
        memory_of(text)


def test_memory_need_includes_overhead_beyond_tensors():
    step = StepBytes(*[0] * 7, peak=10**9)
    assert Target("cuda", 0, bf16=True).need(step) == 1_080_000_000 + 2**30
    assert Target("cpu", 0, bf16=True).need(step) == 1_750_000_000 + 3 * 2**27


def test_changed_config_is_a_copy(compose):
    cfg = compose(*BASE)
    change = fitting.Change({"adapter": "lora", "adapter.blocks": 1, "data.batch_size": 2}, "")
    new = Builder(cfg).with_options(change.words)
    assert [new.value(f"adapter.{key}") for key in ("blocks", "rank", "device")] == [1, 16, "cpu"]
    assert (new.options["adapter"], new.value("data.batch_size")) == ("lora", 2)
    assert (cfg.choices.adapter, cfg.data.batch_size) == ("full", 8)
    assert str(change) == "adapter=lora adapter.blocks=1 data.batch_size=2"
