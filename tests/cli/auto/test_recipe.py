"""hparam=auto, from a command line to a training by what was chosen; what is timed is made up, but for one test."""

import os
import re
import shlex
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from command_line import SMALL, call, in_this_process, write_data
from omegaconf import OmegaConf

from dinoseg.autotune import timing
from dinoseg.autotune.memory import Memory
from dinoseg.autotune.rules import RecipeChoice
from dinoseg.autotune.timing import RecipeTimes
from dinoseg.autotune.trial import Trial
from dinoseg.cli.auto import recipe
from dinoseg.cli.auto.given import drop_typed
from dinoseg.cli.auto.search import time_candidate
from dinoseg.config.nodes import instantiate
from dinoseg.config.plain import to_container
from dinoseg.experiment.builder import Builder
from dinoseg.experiment.step import training_parts
from dinoseg.training import checkpoint
from dinoseg.utils.errors import UserError
from dinoseg.utils.images import read_ids, write_png
from dinoseg.utils.locks import acquire, release
from dinoseg.utils.workers import run_in_process

CHOSEN = ("trainer.steps", "adapter", "data.batch_size", "resolution.crop")
AUTO = ("mode=train", "hparam=auto", *(word for word in SMALL if word.split("=")[0] not in CHOSEN))
FEW = "trainer.steps=2"
DETAIL = ["head=detail", "head.fine=4", "head.width=8"]
TIMED = RecipeTimes(start=0.1, image=0.02, cached=0.01, frozen=0.01, bytes=1000, val=0.01)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    write_data(tmp_path / "data", train=5)
    monkeypatch.setattr("dinoseg.cli.auto.search.run_in_process", lambda work, values, **_: TIMED)
    monkeypatch.setattr("dinoseg.cli.auto.search.monotonic", lambda: 0.0)
    return tmp_path


@pytest.fixture
def choice_alone(folder, monkeypatch):
    """Leave out the mode that follows the choice; its config is written all the same."""
    monkeypatch.setattr("dinoseg.cli.launch.run_mode", lambda *_: None)


def config_of(run):
    return OmegaConf.load(run / "config/config.yaml")


def test_a_run_is_trained_by_what_was_chosen_and_its_recipe_gives_it_again(folder):
    done = call(folder, *AUTO, FEW, "budget.minutes=1", "hydra.run.dir=R")
    assert done.status == 0, done.err
    cfg, first = config_of(folder / "R"), checkpoint.describe(folder / "R/checkpoints/last.safetensors")
    assert (cfg.choices.hparam, cfg.choices.adapter, cfg.choices.loss, cfg.trainer.steps) == (
        *("auto", "frozen", "ce_dice"),
        2,
    )
    assert cfg.data.batch_size == 2 and cfg.data.views == 4 and cfg.resolution.crop == [32, 48]
    assert first["config"]["data"]["views"] == 4 and first["choices"]["head"] == "linear"
    assert "  data.views=4: features of 4 views of each image are cached" in done.out
    assert "; set on the command line: trainer.steps; chosen now:" in done.out
    assert "adapter=frozen: the backbone is frozen" in done.out
    command = next(line for line in done.out.splitlines() if "hparam=chosen" in line).split()[3:]
    assert FEW in command and "budget.minutes=1" not in command
    again = call(folder, *[word.strip("'") for word in command], "hydra.run.dir=S")
    assert again.status == 0, again.err
    second = checkpoint.describe(folder / "S/checkpoints/last.safetensors")
    assert second["config"] == first["config"]


@pytest.mark.heavy
def test_the_command_of_a_recipe_finds_the_folder_that_was_named_before(folder):
    part = folder / "my, own/head/mine.yaml"
    part.parent.mkdir(parents=True)
    part.write_text("defaults: [linear]\nlr: 0.5\n")
    words = (*AUTO, "head=mine", "budget.minutes=1", "mode=plan", "mode.dry_step=false", "--config-dir=my, own")
    done = call(folder, *words, "hydra.run.dir=R")
    assert done.status == 0, done.err
    command = shlex.split(next(line for line in done.out.splitlines() if "hparam=chosen" in line))[3:]
    again = call(folder, *command, "hydra.run.dir=S")
    assert again.status == 0 and config_of(folder / "S").head.lr == 0.5, again.err


def test_what_is_typed_is_taken_as_it_is(folder):
    words = ("head=mlp", "optim.optimizer.lr=1e-3", "data.batch_size=3", "resolution.crop=[24,24]", "loss=focal")
    taken = "data.batch_size, head, loss, optim.optimizer.lr, resolution.crop, trainer.steps"
    done = call(folder, *AUTO, FEW, *words, "budget.minutes=1", "hydra.run.dir=R")
    assert done.status == 0, done.err
    cfg = config_of(folder / "R")
    assert (cfg.choices.head, cfg.choices.loss, cfg.data.batch_size, cfg.optim.optimizer.lr) == (
        "mlp",
        "focal",
        3,
        1e-3,
    )
    assert cfg.resolution.crop == [24, 24] and f"; set on the command line: {taken}" in done.out
    text = re.sub("#.*", "", (folder / "R/config/hparam/chosen.yaml").read_text())
    assert not re.search("crop|head|loss|batch|lr|trainer", text) and "override /adapter: frozen" in text


@pytest.mark.parametrize(
    "typed", ["loss", "loss.criterion", "loss.criterion.factors", "loss.criterion.factors.dice", "loss.weights"]
)
def test_what_goes_with_a_typed_loss_is_left_to_it(typed):
    words = {"loss": "ce_dice", "loss.weights": {"pole": 3.0}, "loss.criterion.factors.dice": 2.0}
    ((choice,), taken) = drop_typed([RecipeChoice({"head": "detail", **words}, "")], frozenset({typed, "data.root"}))
    gone = {"loss": {*words}, "loss.weights": {"loss.weights"}}.get(typed, {"loss.criterion.factors.dice"})
    assert taken == [typed] and choice.words.keys() == {"head", *words} - gone


@pytest.mark.heavy
def test_the_same_command_chooses_the_same_however_fast_the_machine_then_is(folder, monkeypatch):
    words = (*AUTO, "trainer.epochs=1", "budget.minutes=1")
    first = call(folder, *words, "hydra.run.dir=R")
    assert first.status == 0 and "; chosen now:" in first.out, first.err
    monkeypatch.setattr("dinoseg.cli.auto.search.run_in_process", pytest.fail)
    again = call(folder, *words, "seed=1", "mode.pictures=0", "hydra.run.dir=S")
    assert again.status == 0 and "reused from" in again.out, again.err
    one, other = (OmegaConf.to_container(config_of(folder / run)) for run in "RS")
    assert one["seed"] != other["seed"]
    assert [one[key] for key in ("head", "data", "optim", "trainer")] == [
        other[key] for key in ("head", "data", "optim", "trainer")
    ]
    monkeypatch.setattr("dinoseg.cli.auto.search.run_in_process", lambda work, values, **_: TIMED)
    call(folder, *AUTO, "trainer.epochs=1", "budget.minutes=2", "hydra.run.dir=T")
    assert len([*(folder / "outputs/.cache").glob("choices_*.json")]) == 2


@pytest.mark.heavy
@pytest.mark.usefixtures("choice_alone")
def test_a_length_that_was_typed_once_is_chosen_where_it_is_not(folder, monkeypatch):
    words = (*AUTO, "budget.minutes=1", "mode=plan", "mode.dry_step=false")
    assert (
        "; set on the command line: trainer.steps; chosen now:"
        in call(folder, *words, "trainer.steps=2", "hydra.run.dir=R").out
    )
    monkeypatch.setattr("dinoseg.cli.auto.search.run_in_process", pytest.fail)
    done = call(folder, *words, "hydra.run.dir=S")
    assert done.status == 0 and "as given" not in done.out, done.err
    cfg = config_of(folder / "S")
    assert (
        f"trainer.steps={cfg.trainer.steps} trainer.val_every={cfg.trainer.val_every} trainer.max_minutes=" in done.out
    )
    assert 10 < cfg.trainer.steps * cfg.data.batch_size * TIMED.cached < 60


@pytest.mark.heavy
@pytest.mark.usefixtures("choice_alone")
def test_images_of_a_step_in_parts_count_against_the_time(folder):
    words = (*AUTO, "budget.minutes=3", "data.views=null", "trainer.accumulate=3", "mode=plan", "mode.dry_step=false")
    done = call(folder, *words, "hydra.run.dir=R")
    cfg = config_of(folder / "R")
    assert done.status == 0 and cfg.trainer.accumulate == 3, done.err
    assert 100 < cfg.trainer.steps * 3 * cfg.data.batch_size * TIMED.image < 180


@pytest.mark.heavy
def test_a_run_goes_on_with_what_was_chosen_for_it(folder, monkeypatch):
    words = (*AUTO, "budget.minutes=1")
    first = call(folder, *words, FEW)
    assert first.status == 0, first.err
    monkeypatch.setattr("dinoseg.cli.auto.search.run_in_process", pytest.fail)
    (run,) = (folder / "outputs/auto").iterdir()
    again = call(folder, *words, "trainer.steps=4", "resume=auto", f"hydra.run.dir={run}")
    assert again.status == 0 and "resuming" in again.err and "at step 2 of 4" in again.err, again.err
    assert checkpoint.describe(run / "checkpoints/last.safetensors")["progress"]["step"] == 4
    for path in (folder / "outputs/.cache").glob("choices_*.json"):
        path.unlink()  # by name nothing is chosen anew in any case
    third = call(
        folder, "mode=train", "hparam=auto", f"resume={run}", "trainer.steps=6", "engine=cpu", "engine.workers=0"
    )
    assert third.status == 0 and "hparam=auto:" not in third.out, third.err
    assert checkpoint.describe(run / "checkpoints/last.safetensors")["config"]["data"]["views"] == 4


def test_a_run_goes_on_whose_classes_of_any_name_have_weights(folder):
    part = folder / "own/hparam/mine.yaml"
    part.parent.mkdir(parents=True)
    part.write_text(
        "# @package _global_\ndata: {classes: [\"it's, a.b\", '1e3']}\nloss: {weights: {\"it's, a.b\": 2}}\n"
    )
    small = [word for word in SMALL if not word.startswith("data.classes")]
    done = call(folder, "mode=train", *small, "--config-dir=own", "hparam=mine", "hydra.run.dir=R")
    assert done.status == 0, done.err
    again = call(folder, "mode=train", "resume=R", "trainer.steps=3", "engine=cpu", "engine.workers=0")
    assert again.status == 0, again.err
    saved = checkpoint.describe(folder / "R/checkpoints/last.safetensors")
    assert saved["progress"]["step"] == 3 and saved["config"]["loss"]["weights"] == {"it's, a.b": 2}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["budget.minutes=0.1"], "budget.minutes=0.1 is out of range. Give a number of minutes from 1 to 1000000"),
        (["budget.minutes=1e308"], "budget.minutes=1e+308 is out of range. Give a number of minutes from 1 to 1000000"),
        (["data.batch_size=some"], "data.batch_size=some is of type str"),
        (["data.batch_size=0"], "data.batch_size=0 is out of range"),
        (["data.views=some"], "data.views=some is of type str"),
        (["trainer.accumulate=0"], "trainer.accumulate=0 is out of range"),
        (["resolution.crop=[x,y]"], "resolution.crop=['x', 'y'] is of type list of str"),
        (["budget.minutes=null"], "budget.minutes=null"),
        (["budget.minutes=soon"], "budget.minutes=soon"),
        (["hparam=base", "budget.minutes=3"], "budget.minutes=3 has no effect without hparam=auto"),
        (["trainer=multi_head", "heads=[linear]"], "trainer=multi_head trains several heads"),
        (["trainer=distil", "teacher=x"], "images and their masks, not for trainer=distil. Choose a recipe:"),
        (["trainer=slots"], "not for trainer=slots"),
        (["data.root=nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_chosen_is_refused_and_leaves_nothing(folder, words, said):
    done = call(folder, *AUTO, *words, "hydra.run.dir=R")
    assert done.status == 1 and said in done.err, done.err
    assert not (folder / "R").exists()


@pytest.mark.heavy
def test_a_class_without_a_pixel_is_named_before_anything_is_trained(folder):
    done = call(folder, *AUTO, FEW, "data.classes=[dark,bright,lamp]", "budget.minutes=1", "hydra.run.dir=R")
    assert done.status == 0 and "3 classes; without a pixel in train: lamp; 1 min" in done.out, done.out + done.err


@pytest.mark.heavy
@pytest.mark.usefixtures("choice_alone")
def test_a_backbone_is_tuned_where_time_suffices_and_else_stays_frozen(folder, monkeypatch):
    for number in range(5, 21):
        write_png(folder / f"data/train/images/{number}.png", torch.zeros(32, 48, 3, dtype=torch.uint8).numpy())
        write_png(folder / f"data/train/masks/{number}.png", read_ids(folder / "data/train/masks/0.png"))
    slow = replace(TIMED, image=0.2, cached=0.1)
    monkeypatch.setattr("dinoseg.cli.auto.search.run_in_process", lambda work, values, **_: slow)
    words = (*AUTO, FEW, "head=linear")
    adapters = [
        config_of(folder / name).choices.adapter
        for name, minutes in (("R", 30), ("S", 1))
        if call(folder, *words, f"budget.minutes={minutes}", f"hydra.run.dir={name}").status == 0
    ]
    assert adapters == ["full", "frozen"]
    text = (folder / "S/config/hparam/chosen.yaml").read_text()
    assert "with adapter=full there would be time for" in text


def write_halves(folder):
    """Write 21 training images of which no class is thin."""
    halves = np.repeat(np.arange(2, dtype=np.uint8), 16)[:, None].repeat(48, axis=1)
    for number in range(21):
        write_png(folder / f"data/train/images/{number}.png", np.zeros((32, 48, 3), np.uint8))
        write_png(folder / f"data/train/masks/{number}.png", halves)


@pytest.mark.heavy
def test_smaller_images_are_taken_where_they_leave_time_to_tune(folder, monkeypatch):
    write_halves(folder)
    tried = []

    def timed(work, values, **_):
        sides = values["resolution"]["crop"], values["resolution"]["longest"]
        tried.append((values["choices"]["adapter"], *sides))
        return replace(TIMED, image=0.02 if sides[1] else 0.03, cached=None)

    monkeypatch.setattr("dinoseg.cli.auto.search.run_in_process", timed)
    done = call(folder, *AUTO, FEW, "head=linear", "budget.minutes=1", "hydra.run.dir=R")
    assert done.status == 0, done.err
    assert tried == [("frozen", [32, 48], None), ("full", [32, 48], None), ("full", [16, 32], 32)]
    cfg = config_of(folder / "R")
    assert (cfg.choices.adapter, cfg.resolution.longest, cfg.resolution.crop) == ("full", 32, [16, 32])
    assert "with adapter=full there would be time for" in done.out
    tried.clear()
    done = call(folder, *AUTO, FEW, "head=linear", "budget.minutes=1", "resolution.crop=[32,48]", "hydra.run.dir=S")
    assert done.status == 0 and [way for way, *_ in tried] == ["frozen", "full"], done.err  # none smaller than given


@pytest.mark.heavy
@pytest.mark.usefixtures("choice_alone")
@pytest.mark.parametrize(
    ("minutes", "least_smaller", "chosen", "tries"),
    [
        (5, 10**6, ("full", None), ["frozen", "full", "full"]),  # 600 images and more, before it stays frozen
        (1, 10**6, ("frozen", None), ["frozen", "full", "full"]),
        (5, 1200, ("full", 32), ["frozen", "full", "full"]),
    ],
)
def test_a_backbone_is_tuned_on_whole_images_where_smaller_ones_have_no_time_either(
    folder, monkeypatch, minutes, least_smaller, chosen, tries
):
    write_halves(folder)
    tried = []

    def timed(work, values, **_):
        tried.append(values["choices"]["adapter"])
        return replace(TIMED, image=0.1 if values["resolution"]["longest"] else 0.15, cached=None)

    monkeypatch.setattr("dinoseg.cli.auto.search.run_in_process", timed)
    monkeypatch.setattr("dinoseg.autotune.rules.MIN_SMALLER", least_smaller)
    done = call(folder, *AUTO, FEW, "head=linear", f"budget.minutes={minutes}", "hydra.run.dir=R")
    assert done.status == 0, done.err
    cfg = config_of(folder / "R")
    assert ((cfg.choices.adapter, cfg.resolution.longest), tried) == (chosen, tries)
    assert (" images that are smaller." in done.out) == (chosen[0] == "frozen")
    assert ("there would be time for" in done.out) == (chosen != ("full", None))  # of the ways that were passed over


def plan(folder, monkeypatch, taken, *words, timed=TIMED, minutes=1.0):
    """Choose by a fake clock: the n-th candidate takes `taken[n]` seconds, or its time limit; return config and words.

    Each starts only if there is time for it, and what is chosen always ends within the budget.
    """
    clock, each = [0.0], iter(taken)
    for path in (folder / "outputs/.cache").glob("choices_*"):
        path.unlink()

    def trial(work, values, *, timeout):
        seconds = next(each)
        clock[0] += min(seconds, timeout)
        if seconds > timeout:
            raise TimeoutError
        return timed

    monkeypatch.setattr("dinoseg.cli.auto.search.run_in_process", trial)
    monkeypatch.setattr("dinoseg.cli.auto.search.monotonic", lambda: clock[0])
    monkeypatch.setattr("dinoseg.cli.launch.run_mode", lambda *_: None)
    more = (f"budget.minutes={minutes}", "mode=plan", "mode.dry_step=false", f"hydra.run.dir={len(words)}{len(taken)}")
    done = call(folder, *AUTO, *words, *more)
    assert done.status == 0, done.err
    assert clock[0] <= 0.25 * 60 * minutes and next(each, None) is None
    cfg = config_of(folder / f"{len(words)}{len(taken)}")
    assert 60 * cfg.trainer.max_minutes + clock[0] <= 60 * minutes
    return cfg, done


def test_choosing_takes_a_quarter_of_the_budget_and_names_what_was_not_tried(folder, monkeypatch):
    write_halves(folder)
    slow = replace(TIMED, image=0.02, cached=None)
    cfg, done = plan(folder, monkeypatch, (4, 5, 4.9), "head=linear", timed=slow)
    assert cfg.choices.adapter == "full" and "not tried" not in done.out
    assert 0.8 * 46.1 < cfg.trainer.steps * cfg.data.batch_size * 0.02 <= 0.95 * 46.1 / 1.03
    cfg, done = plan(folder, monkeypatch, (8,), "head=linear", timed=slow)
    assert cfg.choices.adapter == "frozen" and "candidate 1 of at most 3, 15 s at most" in done.err
    assert (
        "; adapter=full was not tried: the time for choosing was used up; adapter=full on smaller images was not "
        "tried: the time for choosing was used up"
    ) in done.out


def test_choosing_ends_in_time_where_composing_the_config_takes_long(folder, monkeypatch):
    clock, compose = [0.0], recipe._composed

    def slow(*words):
        clock[0] += 1.0
        return compose(*words)

    def trial(work, values, *, timeout):
        clock[0] += timeout
        raise TimeoutError

    monkeypatch.setattr("dinoseg.cli.auto.search.run_in_process", trial)
    monkeypatch.setattr("dinoseg.cli.auto.search.monotonic", lambda: clock[0])
    monkeypatch.setattr("dinoseg.cli.launch.run_mode", lambda *_: None)
    monkeypatch.setattr(recipe, "_composed", slow)
    done = call(folder, *AUTO, "budget.minutes=1", "mode=plan", "mode.dry_step=false", "hydra.run.dir=R")
    assert done.status == 0 and 12 < clock[0] <= 14, done.err


def test_a_candidate_is_stopped_at_its_time_limit_and_the_cheapest_stays(folder, monkeypatch):
    write_halves(folder)
    cfg, done = plan(folder, monkeypatch, (1, 99), "head=linear")
    assert cfg.choices.adapter == "frozen" and "; adapter=full was stopped: timing it took longer than 14 s" in done.out


@pytest.mark.parametrize(
    ("timed", "expected"),
    [
        (TIMED, (None, "linear", None)),
        (replace(TIMED, image=8.0, cached=None, frozen=1.0), (24, "linear", None)),  # images half as large
        (replace(TIMED, image=500.0, cached=None, frozen=2.0, val=50.0), (12, "linear", "probe")),
        (None, (None, "linear", None)),  # not even timed: an upper estimate
    ],
)
def test_a_budget_is_never_refused_once_it_is_spent(folder, monkeypatch, timed, expected):
    cfg, done = plan(folder, monkeypatch, (1 if timed else 99,), timed=timed)
    longest, head, init = expected
    assert (cfg.resolution.longest, cfg.choices.head, cfg.head.init) == (longest, head, init), done.out
    assert (cfg.trainer.steps >= 10) == (init is None)
    assert ("; its speed is estimated (no time to measure it)" in done.out) == (timed is None)
    if init:
        assert cfg.trainer.steps == cfg.trainer.val_images == 1 and "solved in closed form" in done.out
        assert "there is no time to validate on more than 1 image" in done.out


@pytest.mark.usefixtures("choice_alone")
@pytest.mark.parametrize("seconds", [30, 100])  # of a budget of 60
def test_where_reading_the_data_spends_the_time_for_choosing_the_recipe_still_trains(folder, monkeypatch, seconds):
    times, read = [0.0], recipe.RecipeSearch._case
    monkeypatch.setattr("dinoseg.cli.auto.search.monotonic", lambda: times[0])
    monkeypatch.setattr("dinoseg.cli.auto.search.run_in_process", pytest.fail)

    def slow(chooser, facts):
        times[0] += seconds
        return read(chooser, facts)

    monkeypatch.setattr(recipe.RecipeSearch, "_case", slow)
    done = call(folder, *AUTO, "budget.minutes=1", "mode=plan", "mode.dry_step=false", "hydra.run.dir=R")
    assert done.status == 0, done.err
    cfg, left = config_of(folder / "R"), max(60 - seconds, 12)
    assert cfg.trainer.steps >= 10 and 0.5 * left < 60 * cfg.trainer.max_minutes <= left
    assert (cfg.resolution.longest, cfg.head.init, cfg.data.labelled) == (None, None, None)


def test_a_closed_form_keeps_its_length_and_the_rate_of_its_own_head(folder, monkeypatch):
    timed = RecipeTimes(
        start=0.1, image=100.0, cached=50.0, frozen=2.0, bytes=1000, val=50.0
    )  # 7 images of a quarter fit
    cfg, done = plan(folder, monkeypatch, (1,), "backbone.arch.num_hidden_layers=4", timed=timed)
    assert (cfg.choices.head, cfg.head.init, cfg.trainer.steps, cfg.data.views) == ("linear", "probe", 1, None)
    assert cfg.optim.optimizer.head_lr == cfg.head.lr and f"{cfg.head.lr:g} is the default of head=linear" in done.out


@pytest.mark.usefixtures("choice_alone")
@pytest.mark.heavy
@pytest.mark.parametrize(
    ("words", "adapter", "may_freeze"),
    [
        (["head=linear"], "full", False),  # 1,066 images
        (DETAIL, "full", True),  # 1,454 images, of which the backbone rests for 40 %
        (
            [*DETAIL, "optim.optimizer.freeze_backbone_until=0"],
            "frozen",
            False,
        ),  # 1,066 images are too few without a rest
        ([*DETAIL, "engine.devices=2"], "frozen", False),  # whose ranks gain no time by one
        ([*DETAIL, "adapter=full"], "full", False),  # as typed, without one
        ([*DETAIL, "budget.minutes=1"], "frozen", True),  # and 959 with one
        ([*DETAIL, "budget.minutes=2.75"], "full", True),  # 1,966 would do without a rest; with one it is 2,682
        ([*DETAIL, "trainer.accumulate=80"], "frozen", True),  # with one, not even ten steps of 160
        (["head=linear", "trainer.accumulate=50"], "full", False),
        (["head=linear", "trainer.accumulate=60"], "frozen", False),  # not even ten steps of 120
    ],
)
def test_when_tuning_wins_depends_on_the_head_and_on_a_step(folder, monkeypatch, words, adapter, may_freeze):
    write_halves(folder)
    tried = []

    def timed(work, values, **_):
        way, asked = values["choices"]["adapter"], work.keywords["may_freeze"]
        tried.append((way, asked))
        least = 0.005 if values["resolution"]["longest"] else 0.075  # smaller images are tried, and never enough
        resting = 0.025 if asked and way == "full" else None
        image = 0.025 if way == "frozen" else least
        return replace(TIMED, start=0.5, image=image, cached=None, val=0.05, resting=resting)

    monkeypatch.setattr("dinoseg.cli.auto.search.run_in_process", timed)
    monkeypatch.setattr("dinoseg.autotune.rules.MIN_SMALLER", 10**6)
    more = ("backbone.arch.num_hidden_layers=4", "mode=plan", "mode.dry_step=false")
    done = call(folder, *AUTO, "budget.minutes=1.5", *more, *words, "hydra.run.dir=R")
    assert done.status == 0, done.err
    cfg = config_of(folder / "R")
    rests = adapter == "full" and may_freeze
    assert (cfg.choices.adapter, cfg.optim.optimizer.freeze_backbone_until) == (adapter, 0.4 if rests else 0.0)
    assert ("frozen for the first 40% of the training" in done.out) == rests
    others = [] if "adapter=full" in words else [("full", False)]
    frozen = [] if "adapter=full" in words else [("frozen", may_freeze)]
    assert tried == [*frozen, ("full", may_freeze), *others]  # what a rest takes was timed with the first
    if rests:  # by the time that both kinds of step take, and as a backbone is that is tuned in the end
        seconds = 60 * cfg.budget.minutes
        assert cfg.trainer.steps * cfg.data.batch_size * 0.055 == pytest.approx(0.9 * seconds - 0.5, rel=0.1)
        assert "a trained backbone benefits from views enlarged" in done.out
        assert "adapter=full" in done.out.split("optim.optimizer.backbone_lr=")[1].splitlines()[0]
        assert (cfg.resolution.longest, list(cfg.resolution.crop)) == (None, [32, 48])  # not the smaller ones


@pytest.mark.heavy
def test_while_one_measures_it_is_no_rank(monkeypatch):
    from dinoseg.cli.auto.recipe import _outside_ranks

    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
    for name, value in ranks.items():
        monkeypatch.setenv(name, value)
    with _outside_ranks():
        assert not ranks.keys() & os.environ.keys()
    assert {name: os.environ[name] for name in ranks} == ranks


@pytest.mark.heavy
def test_chosen_batch_is_divided_among_the_ranks(folder, monkeypatch):
    seen = []
    monkeypatch.setattr("dinoseg.cli.launch.run_mode", lambda cfg, out_dir: seen.append(cfg))
    monkeypatch.setattr("dinoseg.cli.launch._share_start", lambda cfg, folder, start: start())
    for name, value in {"WORLD_SIZE": "3", "RANK": "0", "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)
    words = (*AUTO, FEW, "budget.minutes=1")
    assert call(folder, *words, "hydra.run.dir=R").status == 0
    monkeypatch.setattr("platform.node", lambda: "elsewhere")  # as a restarted job finds its choices
    monkeypatch.setattr("dinoseg.cli.auto.recipe.RecipeSearch", pytest.fail)
    assert call(folder, *words, "hydra.run.dir=S").status == 0
    assert [cfg.data.batch_size for cfg in seen] == [3, 3] and [cfg.engine.devices for cfg in seen] == [1, 1]


@pytest.mark.heavy
def test_of_two_that_are_started_at_once_one_chooses_and_the_other_one_takes_the_same(folder, monkeypatch):
    words = (*AUTO, FEW, "budget.minutes=1", "mode=plan", "mode.dry_step=false")
    assert call(folder, *words, "hydra.run.dir=R").status == 0
    (path,) = (folder / "outputs/.cache").glob("choices_*")
    content = path.read_text()
    path.unlink()
    monkeypatch.setattr("dinoseg.cli.auto.recipe.RecipeSearch", pytest.fail)
    first, said = acquire(path.with_suffix(".lock")), []

    def choose(message, *_):
        said.append(message)
        path.write_text(content)
        release(first)

    monkeypatch.setattr("dinoseg.utils.locks.log.warning", choose)
    done = call(folder, *words, "seed=1", "hydra.run.dir=S")
    assert done.status == 0 and "reused from" in done.out, done.err
    assert len(said) == 1 and "waiting for it" in said[0]
    assert [*(folder / "outputs/.cache").glob("choices_*")] == [path]


@pytest.mark.heavy
@pytest.mark.usefixtures("choice_alone")
def test_choices_that_cannot_be_kept_are_taken_all_the_same(folder, monkeypatch):
    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr("dinoseg.cli.auto.recipe.write_choices", full)
    done = call(folder, *AUTO, FEW, "budget.minutes=1", "hydra.run.dir=R")
    assert done.status == 0 and (folder / "R/config/hparam/chosen.yaml").is_file(), done.err
    assert "(No space left on device): the next run chooses again." in done.err


def test_the_memory_that_is_free_decides_too(folder, monkeypatch):
    monkeypatch.setattr("dinoseg.autotune.memory.free_bytes", lambda device: 1000)
    done = call(folder, *AUTO, FEW, "budget.minutes=1", "hydra.run.dir=R")
    assert done.status == 1 and "GiB, and 0.0 GiB are free" in done.err


@pytest.fixture
def chosen_with(folder, monkeypatch):
    """Return a function that chooses where a step needs what `of` says of parts and samples; 100 bytes are free."""
    write_data(folder / "large", train=25, size=(64, 64))
    monkeypatch.setattr("dinoseg.cli.launch.run_mode", lambda cfg, out_dir: None)
    monkeypatch.setattr("dinoseg.autotune.memory.free_bytes", lambda device: 100)
    monkeypatch.setattr("dinoseg.autotune.target.Target.need", lambda target, step: step)

    def choose(of, *words):
        monkeypatch.setattr(
            "dinoseg.autotune.fitting.step_bytes", lambda parts, loss, *, samples, **_: of(parts, samples)
        )
        done = call(folder, *AUTO, "data.root=large", "budget.minutes=9", f"hydra.run.dir={len(words)}", *words)
        assert done.status == 0, done.err
        return config_of(folder / str(len(words))), done.out

    return choose


def test_a_batch_is_no_larger_than_what_fits(chosen_with):
    cfg, out = chosen_with(lambda parts, samples: 20 * samples if parts.crop == (64, 64) else 1)
    assert (cfg.data.batch_size, cfg.trainer.accumulate) == (4, 1) and "; 8 would not fit into memory" in out
    assert 200 < cfg.trainer.steps * 4 * TIMED.cached < 540


@pytest.mark.heavy
def test_what_memory_makes_of_a_batch_stays_but_for_a_typed_one(chosen_with):
    cfg, _ = chosen_with(lambda parts, samples: 60 * samples)
    assert (cfg.data.batch_size, cfg.trainer.accumulate) == (1, 2)
    assert 200 < cfg.trainer.steps * 2 * TIMED.cached < 540
    cfg, _ = chosen_with(lambda parts, samples: 60 * samples, "data.batch_size=4")
    assert (cfg.data.batch_size, cfg.trainer.accumulate) == (4, 1)


@pytest.mark.heavy
def test_memory_changes_no_adapter_that_was_typed(chosen_with):
    def of(parts, samples):
        is_frozen = parts.outline().backbone.first_trained is None
        return 99 if parts.takes_blocks or is_frozen else 101  # LoRA takes a number of blocks, adapter=full none

    assert chosen_with(of)[0].choices.adapter == "lora"
    with pytest.raises(AssertionError, match="A training step needs at least 0.0 GiB"):
        chosen_with(of, "adapter=full")


@pytest.mark.usefixtures("choice_alone")
@pytest.mark.parametrize(
    ("words", "minutes"), [((), 30), pytest.param(("budget.minutes=9",), 9, marks=pytest.mark.heavy)]
)
def test_what_is_timed_knows_the_minutes_typed_or_not(folder, monkeypatch, words, minutes):
    asked = []
    monkeypatch.setattr(
        "dinoseg.cli.auto.search.run_in_process",
        lambda work, _, timeout: asked.append((work.keywords["minutes"], timeout)) or TIMED,
    )
    done = call(folder, *AUTO, "mode=plan", "mode.dry_step=false", *words, "hydra.run.dir=R")
    assert done.status == 0, done.err
    seconds = 15 * minutes  # a quarter of the budget
    assert [each for each, _ in asked] == [minutes] and seconds / 2 < asked[0][1] <= seconds
    most = f"candidates are timed for at most {seconds} s"
    told = [f"inspects data and machine: budget.minutes={minutes} starts now, {most}"]
    told += [
        "times adapter=frozen head=linear on crops of 32 x 48 (height x width): candidate 1 of at most 1, "
        f"{seconds} s at most"
    ]
    assert [line for line in done.err.splitlines() if "hparam=auto" in line] == [f"hparam=auto {each}" for each in told]


@pytest.mark.usefixtures("choice_alone")
def test_what_is_timed_has_an_image_for_each_device(folder, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "dinoseg.cli.auto.search.run_in_process",
        lambda work, values, **_: asked.append(values["data"]["batch_size"]) or TIMED,
    )
    done = call(folder, *AUTO, "engine.devices=3", "mode=plan", "mode.dry_step=false", "hydra.run.dir=R")
    assert done.status == 0 and asked == [3], done.err


@pytest.mark.parametrize(
    ("kind", "environment", "words", "apart", "sharing"),
    [
        ("cpu", {}, (), 1, 1),
        ("cpu", {}, ("engine.devices=3",), 1, 3),  # which share the threads that one is timed with
        ("cuda", {}, ("engine.devices=3",), 3, 1),
        ("cpu", {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, (), 4, 2),  # on two machines
        ("cuda", {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, (), 4, 1),
    ],
)
def test_several_ranks_are_timed_as_they_work(folder, monkeypatch, kind, environment, words, apart, sharing):
    asked = []

    class RecipeSearch(recipe.RecipeSearch):
        def __init__(self, *given, **options):
            with monkeypatch.context() as patched:
                patched.setattr("dinoseg.training.engine.Engine.device", torch.device(kind), raising=False)
                super().__init__(*given, **options)
            asked.append((self._ranks, self.memory.ranks))
            raise UserError("enough")

    monkeypatch.setattr(recipe, "RecipeSearch", RecipeSearch)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    done = call(folder, *AUTO, *words, "mode=plan", "mode.dry_step=false", "hydra.run.dir=R")
    assert asked == [(apart, sharing)], done.err


def test_a_rank_is_timed_with_its_share_of_a_batch(tmp_path, compose, monkeypatch):
    write_data(tmp_path / "data")
    sizes = []

    def steps(parts, make, engine, batches, **_):
        sizes.append(parts.batch_size)
        return Trial([9.0, 6.0])

    monkeypatch.setattr(timing, "try_steps", steps)
    monkeypatch.setattr(timing, "_seconds_of_val", lambda *_: 4.0)
    monkeypatch.setattr(timing, "_cut", lambda model, batch, engine: (model.frozen(batch.image.float()), 8.0))
    cfg = compose(*SMALL, f"data.root={tmp_path}/data", "adapter=frozen", "data.batch_size=4")
    alone, two = (time_candidate(to_container(cfg), minutes=9, ranks=ranks) for ranks in (1, 2))
    assert sizes == [4, 4, 2, 2]
    assert (alone.image, alone.cached, alone.frozen, alone.val) == (1.5, 1.5, 2.0, 4.0)
    assert (two.image, two.cached, two.frozen, two.val) == (1.5, 1.5, 2.0, 2.0)  # half the images, and two at once


@pytest.mark.usefixtures("choice_alone")
def test_time_that_choosing_a_batch_takes_is_counted(folder, monkeypatch):
    clock, fits = [0.0], Memory.suffices
    monkeypatch.setattr("dinoseg.cli.auto.search.monotonic", lambda: clock[0])
    words = (*AUTO, "mode=plan", "mode.dry_step=false", "budget.minutes=10", "data.views=null")
    monkeypatch.setattr(
        Memory, "suffices", lambda memory, recipe: clock.__setitem__(0, clock[0] + 300) or fits(memory, recipe)
    )
    done = call(folder, *words, "hydra.run.dir=R")
    assert done.status == 0 and "5.0 of 10 minutes are left" in done.out, done.err
    cfg = config_of(folder / "R")
    assert cfg.trainer.steps * cfg.data.batch_size == pytest.approx(300 * 0.95 / 1.03 / 0.02, rel=0.02)


@pytest.mark.heavy
@pytest.mark.parametrize("words", [(), ("budget.minutes=9",)])
def test_a_recipe_is_timed_on_its_own_data(tmp_path, monkeypatch, words):
    write_data(tmp_path / "data", train=5)
    monkeypatch.setattr("dinoseg.autotune.timing._MAX", 0.1)
    monkeypatch.setattr("dinoseg.cli.auto.search.run_in_process", in_this_process)
    done = call(tmp_path, *AUTO, "mode=plan", "mode.dry_step=false", *words, "hydra.run.dir=R")
    assert done.status == 0 and "A training step of" in done.out, done.err
    cfg = config_of(tmp_path / "R")
    assert cfg.trainer.steps > 10 and f"trainer.steps={cfg.trainer.steps} trainer.val_every=" in done.out
    assert run_in_process is not in_this_process


@pytest.mark.parametrize(
    ("adapter", "may_freeze", "tried"),
    [
        ("full", True, [(8.0, False, 0.4), (4.0, True, 0.4)]),
        ("full", False, [(8.0, False, 0.0)]),
        ("frozen", True, [(8.0, False, 0.0), (2.0, False, 0.0)]),  # nothing learns that could rest; kept features
    ],
)
def test_steps_of_a_backbone_that_rests_are_timed_where_it_learns(
    tmp_path, compose, monkeypatch, adapter, may_freeze, tried
):
    write_data(tmp_path / "data")
    found = []

    def steps(parts, make, engine, batches, *, lasting, rests=False, **_):
        groups = parts.optimizer(make()).param_groups
        found.append((lasting, rests, max((group["start"] for group in groups if group["frozen"]), default=0.0)))
        return Trial([9.0, 2.0 if rests else 4.0])

    monkeypatch.setattr(timing, "try_steps", steps)
    cfg = compose(*SMALL, f"data.root={tmp_path}/data", f"adapter={adapter}", "data.batch_size=2")
    timed = time_candidate(to_container(cfg), minutes=9, may_freeze=may_freeze)
    assert found == [(pytest.approx(lasting), rests, begin) for lasting, rests, begin in tried]
    assert (timed.image, timed.resting) == (2.0, 1.0 if (adapter, may_freeze) == ("full", True) else None)


@pytest.mark.usefixtures("choice_alone")
@pytest.mark.parametrize(("patch", "head"), [(8, "detail"), (7, "multiscale")])
def test_patches_of_an_odd_size_have_a_head_of_their_own(folder, patch, head):
    words = [word for word in AUTO if "patch_size" not in word and "num_hidden_layers" not in word]
    words += [f"backbone.patch_size={patch}", "backbone.arch.num_hidden_layers=4", "budget.minutes=1", "mode=plan"]
    done = call(folder, *words, "mode.dry_step=false", "hydra.run.dir=R")
    assert done.status == 0 and config_of(folder / "R").choices.head == head, done.err


def test_a_validation_of_few_images_is_timed_with_their_reading(tmp_path, compose, monkeypatch):
    write_data(tmp_path / "data", val=3)
    clock = [0.0]
    monkeypatch.setattr(timing, "evaluate", lambda *_, batches, **__: list(batches))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    cfg = compose(*SMALL, f"data.root={tmp_path}/data")
    parts, data = training_parts(Builder(cfg)), Builder(cfg).dataset("val")
    kind, data_module = type(data), SimpleNamespace(val=data, policy=None)
    read = kind.__getitem__
    slow = lambda data, place: clock.__setitem__(0, clock[0] + 5) or read(data, place)  # noqa: E731
    monkeypatch.setattr(kind, "__getitem__", slow)
    assert timing._seconds_of_val(parts.loss(), data_module, parts.model(), instantiate(cfg.engine)) == 5


def test_a_validation_is_timed_on_images_of_all_sizes(tmp_path, compose, monkeypatch):
    write_data(tmp_path / "data", val=11)
    for number in range(10):  # but for the last one small
        write_png(tmp_path / f"data/val/images/{number}.png", torch.zeros(4, 4, 3, dtype=torch.uint8).numpy())
        write_png(tmp_path / f"data/val/masks/{number}.png", torch.zeros(4, 4, dtype=torch.uint8).numpy())
    clock, asked = [0.0], []

    def evaluated(model, data, engine, *, policy, loss, batches):
        asked.append((policy, loss))
        clock[0] += sum(batch.image.numel() + batch.mask.numel() for batch in batches)

    monkeypatch.setattr(timing, "evaluate", evaluated)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    cfg = compose(*SMALL, f"data.root={tmp_path}/data")
    engine = instantiate(cfg.engine)
    parts, data = training_parts(Builder(cfg)), Builder(cfg).dataset("val")
    large = [index for index, name in enumerate(data.names) if name == "10"]
    data_module = SimpleNamespace(val=data, policy=instantiate(cfg.inference))
    seconds = timing._seconds_of_val(parts.loss(), data_module, parts.model(), engine)
    assert large == [2] and seconds == pytest.approx((5 * 64 + 32 * 48 * 4) / 6)
    assert clock[0] == pytest.approx(64 + 6 * seconds)  # one image alone comes before
    assert [policy for policy, _ in asked] == [data_module.policy] * 2
    assert all(loss is not None for _, loss in asked)


@pytest.mark.heavy
def test_images_smaller_than_a_patch_are_chosen_for_and_one_alone_is_refused(folder):
    for name, train in (("few", 2), ("one", 1)):
        write_data(folder / name, train=train, val=1, size=(6, 7))
    words = (*AUTO, "head=linear", "trainer.steps=2")
    done = call(folder, *words, "data.root=few", "hydra.run.dir=run")
    assert done.status == 0, done.err
    assert config_of(folder / "run").resolution.crop == [8, 8]
    alone = call(folder, *words, "data.root=one", "hydra.run.dir=other")
    assert alone.status == 1
    assert "error: data.batch_size=1: head=linear is trained on 2 images or more per device" in alone.err
    assert "Traceback" not in alone.err


@pytest.mark.parametrize("text", ["}{", "data: [1\n", "\ta: 1\n", "a: \x00\n"])
def test_a_recipe_that_was_edited_to_no_yaml_is_named(folder, text):
    path = folder / "config/hparam/chosen.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    done = call(folder, "mode=train", *SMALL, "hparam=chosen", "--config-dir", str(folder / "config"))
    assert done.status == 1 and done.err.startswith("error: A config file is not valid YAML: "), done.err
    assert str(path) in done.err and len(done.err.splitlines()) == 1
