"""hparam=auto, from a command line to a training by what was chosen; what is timed is made up, but for one test."""

import shlex
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from command_line import SMALL, call, in_this_process, write_data
from making import save
from omegaconf import OmegaConf
from overlapping_shapes import write_overlaps
from PIL import Image

from dinoseg.config.nodes import instantiate
from dinoseg.config.plain import to_container
from dinoseg.experiment.builder import Builder
from dinoseg.experiment.recipe import config_description
from dinoseg.extensions.auto import choose, recipe, timing
from dinoseg.extensions.auto.recipe import drop_typed
from dinoseg.extensions.auto.rules import RecipeChoice
from dinoseg.extensions.auto.timing import RecipeTimes
from dinoseg.extensions.auto.training_parts import training_parts
from dinoseg.extensions.auto.trial import Trial
from dinoseg.training import checkpoint
from dinoseg.utils.errors import UserError
from dinoseg.utils.images import write_png
from dinoseg.utils.locks import acquire, release

CHOSEN = ("trainer.steps", "adapter", "data.batch_size", "resolution.crop")
AUTO = ("mode=train", "hparam=auto", *(word for word in SMALL if word.split("=")[0] not in CHOSEN))
FEW = "trainer.steps=2"
DETAIL = ["head=detail", "head.fine=4", "head.width=8"]
TIMED = RecipeTimes(start=0.1, tuned=0.02, frozen=0.02, forward=0.0, val=0.01)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    write_data(tmp_path / "data", train=5)
    monkeypatch.setattr(choose, "run_in_process", lambda work, values, **_: TIMED)
    monkeypatch.setattr(choose, "monotonic", lambda: 0.0)
    return tmp_path


@pytest.fixture
def choose_recipe(folder, monkeypatch):
    """Return a function that chooses for a command, without the mode that follows: its config is written all the same.

    It returns the config and the command's end.
    """
    monkeypatch.setattr("dinoseg.cli.launch.run_mode", lambda *_: None)

    def run(*words, folder_of_run="R", start=AUTO):
        done = call(folder, *start, "mode=plan", *words, f"hydra.run.dir={folder_of_run}")
        assert done.status == 0, done.err
        return OmegaConf.load(folder / folder_of_run / "config/config.yaml"), done

    return run


def test_recorded_recipe_reproduces_the_chosen_run(folder, choose_recipe):
    part = folder / "my, own/head/mine.yaml"
    part.parent.mkdir(parents=True)
    part.write_text("defaults: [linear]\nlr: 0.5\n")
    cfg, done = choose_recipe(FEW, "budget.minutes=1", "head=mine", "--config-dir=my, own", "resume=auto")
    choices = (cfg.choices.hparam, cfg.choices.adapter, cfg.choices.loss, cfg.trainer.steps)
    assert choices == ("auto", "frozen", "ce_dice", 2)
    assert cfg.data.batch_size == 2 and cfg.resolution.crop == [32, 48]
    assert "; set on the command line: head, trainer.steps; chosen now:" in done.out
    assert "adapter=frozen: the backbone is frozen" in done.out
    (command,) = (shlex.split(line)[3:] for line in done.out.splitlines() if "hparam=chosen" in line)
    assert FEW in command and "budget.minutes=1" not in command
    assert not [word for word in command if word.startswith("resume=")]  # it starts a new run
    again, _ = choose_recipe(start=command, folder_of_run="S")
    configs = [config_description(Builder(each))["config"] for each in (cfg, again)]
    assert configs[0] == configs[1] and again.head.lr == 0.5


@pytest.mark.parametrize(
    "typed", ["loss", "loss.criterion", "loss.criterion.factors", "loss.criterion.factors.dice", "loss.weights"]
)
def test_choices_that_belong_to_a_typed_loss_are_dropped(typed):
    words = {"loss": "ce_dice", "loss.weights": {"pole": 3.0}, "loss.criterion.factors.dice": 2.0}
    ((choice,), taken) = drop_typed([RecipeChoice({"head": "detail", **words}, "")], frozenset({typed, "data.root"}))
    gone = {"loss": {*words}, "loss.weights": {"loss.weights"}}.get(typed, {"loss.criterion.factors.dice"})
    assert taken == [typed] and choice.words.keys() == {"head", *words} - gone


@pytest.mark.heavy
def test_same_command_reuses_its_choices_on_any_machine_speed(folder, choose_recipe, monkeypatch):
    words = ("trainer.epochs=1", "budget.minutes=1")
    one, first = choose_recipe(*words)
    with monkeypatch.context() as patched:
        patched.setattr(choose, "run_in_process", pytest.fail)
        other, again = choose_recipe(*words, "seed=1", "mode.tflops=1", folder_of_run="S")
    assert "; chosen now:" in first.out and "reused from" in again.out and one.seed != other.seed
    assert all(one[group] == other[group] for group in ("head", "data", "optim", "trainer"))
    choose_recipe("trainer.epochs=1", "budget.minutes=2", folder_of_run="T")
    assert len([*(folder / "outputs/.cache").glob("choices_*.json")]) == 2


@pytest.mark.heavy
def test_length_is_chosen_if_it_is_not_typed_again(choose_recipe, monkeypatch):
    _, done = choose_recipe("budget.minutes=1", "trainer.steps=2")
    assert "; set on the command line: trainer.steps; chosen now:" in done.out
    monkeypatch.setattr(choose, "run_in_process", pytest.fail)
    cfg, done = choose_recipe("budget.minutes=1", folder_of_run="S")
    words = f"trainer.steps={cfg.trainer.steps} trainer.val_every={cfg.trainer.val_every} trainer.max_minutes="
    assert "as given" not in done.out and words in done.out
    assert 10 < cfg.trainer.steps * cfg.data.batch_size * TIMED.frozen < 60


@pytest.mark.heavy
def test_images_of_a_step_in_parts_count_against_the_time(choose_recipe):
    cfg, _ = choose_recipe("budget.minutes=3", "data.views=null", "trainer.accumulate=3")
    assert cfg.trainer.accumulate == 3 and 100 < cfg.trainer.steps * 3 * cfg.data.batch_size * TIMED.frozen < 180


@pytest.mark.heavy
def test_resumed_run_uses_its_recorded_choices(folder, monkeypatch):
    words = (*AUTO, "budget.minutes=1")
    first = call(folder, *words, FEW)
    assert first.status == 0, first.err
    monkeypatch.setattr(choose, "run_in_process", pytest.fail)
    (run,) = (folder / "outputs/auto").iterdir()
    again = call(folder, *words, "trainer.steps=4", "resume=auto", f"hydra.run.dir={run}")
    assert again.status == 0 and "resuming" in again.err and "at step 2 of 4" in again.err, again.err
    assert checkpoint.describe(run / "checkpoints/last.safetensors")["progress"]["step"] == 4
    for path in (folder / "outputs/.cache").glob("choices_*.json"):
        path.unlink()  # by name nothing is chosen anew in any case
    machine = ("engine=cpu", "engine.workers=0")
    third = call(folder, "mode=train", "hparam=auto", f"resume={run}", "trainer.steps=6", *machine)
    assert third.status == 0 and "hparam=auto:" not in third.out, third.err
    assert checkpoint.describe(run / "checkpoints/last.safetensors")["config"]["data"]["batch_size"] == 2
    configs = [OmegaConf.load(path) for path in run.glob("config*/config.yaml")]
    assert len(configs) == 3 and not any("chooser" in cfg for cfg in configs)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("budget.minutes=0.1", "budget.minutes=0.1 is out of range. Give a number of minutes from 1 to 1000000"),
        ("data.batch_size=0", "data.batch_size=0 is out of range"),
        ("data.views=some", "data.views=some is of type str"),
        ("trainer.accumulate=0", "trainer.accumulate=0 is out of range"),
        ("resolution.crop=[x,y]", "resolution.crop=['x', 'y'] is of type list of str"),
        ("budget.minutes=null", "budget.minutes=null"),
        ("hparam=base budget.minutes=3", "Options that have it: hparam=auto."),
        ("trainer=distil teacher=x", "images and their masks, not for trainer=distil. Choose a recipe:"),
        ("trainer=slots", "not for trainer=slots"),
        ("data.root=nowhere", "nowhere"),
    ],
)
def test_impossible_choice_is_refused_and_leaves_no_folder(folder, line, said):
    done = call(folder, *AUTO, *line.split(), "hydra.run.dir=R")
    assert done.status == 1 and said in done.err, done.err
    assert not (folder / "R").exists()


@pytest.mark.heavy
def test_class_without_pixels_is_reported_before_training(choose_recipe):
    _, done = choose_recipe(FEW, "data.classes=[dark,bright,lamp]", "budget.minutes=1")
    assert "3 classes; without a pixel in train: lamp; 1 min" in done.out, done.out + done.err


def write_halves(folder):
    """Write 21 training images of which no class is thin."""
    halves = np.repeat(np.arange(2, dtype=np.uint8), 16)[:, None].repeat(48, axis=1)
    for number in range(21):
        write_png(folder / f"data/train/images/{number}.png", np.zeros((32, 48, 3), np.uint8))
        write_png(folder / f"data/train/masks/{number}.png", halves)


def test_launcher_ranks_do_not_choose(folder, monkeypatch):
    monkeypatch.setattr("dinoseg.training.rendezvous.share_from_rank0", lambda text, **_: text())
    for name, value in {"WORLD_SIZE": "3", "RANK": "0", "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)
    done = call(folder, *AUTO, FEW, "budget.minutes=1", "hydra.run.dir=R")
    assert done.status == 1 and "hparam=auto chooses before the ranks start" in done.err
    assert "engine.devices=N" in done.err


@pytest.fixture
def choose_by_clock(choose_recipe, monkeypatch):
    """Return a function that chooses by a fake clock, with a timing that takes so many seconds or its time limit.

    The data are read for some seconds before.
    """
    clock = [0.0]
    facts_of = choose.facts_of
    monkeypatch.setattr(choose, "monotonic", lambda: clock[0])

    def run(seconds, *words, timed=TIMED, reading=0):
        def read(*data):
            clock[0] += reading
            return facts_of(*data)

        def time_it(work, values, *, timeout):
            clock[0] += min(seconds, timeout)
            if seconds > timeout:
                raise TimeoutError
            return timed

        monkeypatch.setattr(choose, "facts_of", read)
        monkeypatch.setattr(choose, "run_in_process", time_it)
        cfg, done = choose_recipe(*words)
        assert 60 * cfg.trainer.max_minutes + clock[0] <= 60 * cfg.budget.minutes
        return cfg, done

    return run


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("words", "adapter", "share"),
    [
        (["head=linear"], "full", 0.0),  # 1,066 images
        (DETAIL, "full", 0.4),  # 1,454, of which 40 % with a frozen backbone
        ([*DETAIL, "optim.optimizer.freeze_backbone_until=0"], "frozen", 0.0),  # 1,066 with a trained one
        ([*DETAIL, "engine.devices=2"], "frozen", 0.0),  # ranks save no time by freezing
        ([*DETAIL, "adapter=full"], "full", 0.0),  # as typed
        ([*DETAIL, "budget.minutes=8"], "full", 0.0),  # 2,843 without freezing
    ],
)
def test_backbone_phases_depend_on_head_and_time(folder, choose_by_clock, words, adapter, share):
    write_halves(folder)
    timed = replace(TIMED, start=0.5, tuned=0.15, frozen=0.05, val=0.1)
    cfg, done = choose_by_clock(1, "budget.minutes=3", "backbone.arch.num_hidden_layers=4", *words, timed=timed)
    assert (cfg.choices.adapter, cfg.optim.optimizer.freeze_backbone_until) == (adapter, share), done.out
    image = 0.05 if adapter == "frozen" else 0.15 - share * 0.1
    seconds = 60 * cfg.budget.minutes
    assert cfg.trainer.steps * cfg.data.batch_size * image == pytest.approx(0.9 * seconds, rel=0.15)
    assert ("frozen for the first 40% of the training" in done.out) == (share > 0)
    assert ("there is time to train it on only" in done.out) == (adapter == "frozen")


SLOW = replace(TIMED, frozen=100.0, val=50.0)


@pytest.mark.parametrize(
    ("seconds", "timed", "words", "head", "init"),
    [
        (1, SLOW, (), "linear", "probe"),
        pytest.param(1, SLOW, ("head=mlp",), "mlp", None, marks=pytest.mark.heavy),
        # timing is stopped: a cautious estimate
        pytest.param(99, TIMED, (), "linear", None, marks=pytest.mark.heavy),
    ],
)
def test_any_budget_gives_a_recipe(choose_by_clock, seconds, timed, words, head, init):
    cfg, done = choose_by_clock(seconds, "budget.minutes=1", *words, timed=timed)
    assert (cfg.choices.adapter, cfg.choices.head, cfg.head.get("init")) == ("frozen", head, init), done.out
    assert (cfg.trainer.steps >= 10) == (init is None and timed is TIMED)
    assert ("solved in closed form" in done.out) == (init is not None) and (cfg.trainer.steps == 1 or not init)


def test_reading_the_data_may_use_up_the_time_for_timing(choose_by_clock):
    cfg, done = choose_by_clock(99, "budget.minutes=1", reading=30)
    assert 15 < 60 * cfg.trainer.max_minutes <= 30 and "timing took too long" not in done.err  # it did not begin


@pytest.mark.parametrize(("kind", "ranks"), [("cpu", 1), ("cuda", 3)])
def test_several_ranks_are_timed_as_they_work(folder, monkeypatch, kind, ranks):
    """Those of a CPU share the threads that one is timed with."""
    seen = []

    def time_it(work, values, **_):
        seen.append(work.keywords["ranks"])
        raise UserError("enough")

    original = recipe.choose

    def choose_on_device(compose, data, engine, *given, **options):
        with monkeypatch.context() as patched:
            patched.setattr("dinoseg.training.engine.Engine.device", torch.device(kind), raising=False)
            return original(compose, data, engine, *given, **options)

    monkeypatch.setattr(choose, "run_in_process", time_it)
    monkeypatch.setattr(recipe, "choose", choose_on_device)
    done = call(folder, *AUTO, "engine.devices=3", "mode=plan", "hydra.run.dir=R")
    assert seen == [ranks], done.err


@pytest.mark.parametrize(("adapter", "timed"), [("full", 2), ("frozen", 1)])
def test_a_rank_is_timed_with_its_share_of_a_batch(tmp_path, compose, monkeypatch, adapter, timed):
    write_data(tmp_path / "data")
    sizes = []

    def steps(parts, engine, batches, **_):
        sizes.append(parts.batch_size)
        return Trial([9.0, 6.0])

    monkeypatch.setattr(timing, "try_steps", steps)
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def evaluate(*_, batches, **__):
        clock[0] += 4.0 * len([*batches])

    monkeypatch.setattr(timing, "evaluate", evaluate)
    cfg = compose(*SMALL, f"data.root={tmp_path}/data", f"adapter={adapter}", "data.batch_size=4")
    found = [
        choose.time_config(to_container(cfg), trains=adapter == "full", freezes=True, minutes=9, ranks=ranks)
        for ranks in (1, 2)
    ]
    assert sizes == [4] * timed + [2] * timed
    tuned = 1.5 if adapter == "full" else None
    for times, val in zip(found, (4.0, 2.0), strict=True):  # with two ranks half the images, and two at once
        assert (times.tuned, times.frozen, times.val) == (tuned, 1.5, val)


@pytest.mark.heavy
def test_concurrent_starts_share_one_choice(folder, choose_recipe, monkeypatch):
    choose_recipe(FEW, "budget.minutes=1")
    (path,) = (folder / "outputs/.cache").glob("choices_*")
    content = path.read_text()
    path.unlink()
    monkeypatch.setattr(recipe, "choose", pytest.fail)
    first = acquire(path.with_suffix(".lock"))
    said = []

    def choose_first(_, message):
        said.append(message)
        path.write_text(content)
        release(first)

    monkeypatch.setattr("dinoseg.utils.waiting.log.warning", choose_first)
    _, done = choose_recipe(FEW, "budget.minutes=1", "seed=1", folder_of_run="S")
    assert "reused from" in done.out and len(said) == 1 and "waiting for it" in said[0]
    assert [*(folder / "outputs/.cache").glob("choices_*")] == [path]


@pytest.mark.heavy
def test_choices_are_used_even_if_they_cannot_be_stored(folder, choose_recipe, monkeypatch):
    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(recipe, "write_choices", full)
    _, done = choose_recipe(FEW, "budget.minutes=1")
    assert (folder / "R/config/hparam/chosen.yaml").is_file()
    assert "(No space left on device): the next run chooses again." in done.err


def test_timing_gets_its_minutes_and_an_image_for_each_device(choose_recipe, monkeypatch):
    asked = []

    def time_it(work, values, *, timeout):
        asked.append((work.keywords["minutes"], timeout, values["data"]["batch_size"]))
        return TIMED

    monkeypatch.setattr(choose, "run_in_process", time_it)
    _, done = choose_recipe("budget.minutes=9", "engine.devices=3")
    ((minutes, timeout, images),) = asked
    seconds = 9 * 15  # a quarter of the budget
    assert (minutes, images) == (9, 3) and seconds / 2 < timeout <= seconds
    told = ["inspects data and machine: budget.minutes=9 starts now"]
    told += [f"times adapter=frozen head=linear on crops of 32 x 48 (height x width), for at most {seconds} s"]
    assert [line for line in done.err.splitlines() if "hparam=auto" in line] == [f"hparam=auto {each}" for each in told]


@pytest.mark.heavy
@pytest.mark.parametrize("words", [(), ("budget.minutes=9",)])
def test_a_recipe_is_timed_on_its_own_data(choose_recipe, monkeypatch, words):
    monkeypatch.setattr(timing, "_MAX", 0.1)
    monkeypatch.setattr(choose, "run_in_process", in_this_process)
    monkeypatch.setattr(choose, "monotonic", time.monotonic)
    cfg, done = choose_recipe(*words)
    assert cfg.trainer.steps > 10 and f"trainer.steps={cfg.trainer.steps} trainer.val_every=" in done.out


def test_odd_patch_sizes_choose_another_head(choose_recipe):
    start = [word for word in AUTO if "patch_size" not in word and "num_hidden_layers" not in word]
    words = ("backbone.patch_size=7", "backbone.arch.num_hidden_layers=4", "budget.minutes=1")
    assert choose_recipe(*words, start=start)[0].choices.head == "multiscale"  # instead of detail


def test_a_validation_is_timed_with_the_reading_of_all_sizes(tmp_path, compose, monkeypatch):
    write_data(tmp_path / "data", val=11)
    for number in range(10):  # but for the last one small
        write_png(tmp_path / f"data/val/images/{number}.png", np.zeros((4, 4, 3), np.uint8))
        write_png(tmp_path / f"data/val/masks/{number}.png", np.zeros((4, 4), np.uint8))
    cfg = compose(*SMALL, f"data.root={tmp_path}/data")
    parts = training_parts(Builder(cfg))
    data = Builder(cfg).dataset("val")
    data_module = SimpleNamespace(val=data, strategy=Builder(cfg).part("inference"))
    clock = [0.0]
    asked = []
    read = type(data).__getitem__

    def read_slowly(data, index):
        item = read(data, index)
        clock[0] += item["image"].numel() + item["mask"].numel()
        return item

    def evaluate(model, data, engine, *, strategy, loss, batches):
        asked.append((strategy, loss))
        count = len(list(batches))
        clock[0] += count

    monkeypatch.setattr(type(data), "__getitem__", read_slowly)
    monkeypatch.setattr(timing, "evaluate", evaluate)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    seconds = timing._seconds_of_val(parts.loss(), data_module, parts.model(), instantiate(cfg.engine))
    assert [index for index, name in enumerate(data.names) if name == "10"] == [2]
    assert seconds == pytest.approx((5 * 64 + 32 * 48 * 4) / 6 + 1)
    ((strategy, loss),) = asked
    assert strategy == data_module.strategy and loss is not None


@pytest.mark.parametrize("text", ["}{", "data: [1\n", "\ta: 1\n", "a: \x00\n"])
def test_recipe_edited_to_invalid_yaml_is_named(folder, text):
    path = folder / "config/hparam/chosen.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    done = call(folder, "mode=train", *SMALL, "hparam=chosen", "--config-dir", str(folder / "config"))
    assert done.status == 1 and f"{path} is not a config file (" in done.err, done.err
    assert str(path) in done.err and len(done.err.splitlines()) == 1


def test_trained_and_frozen_backbone_are_timed_in_one_process(tmp_path, compose, monkeypatch):
    write_data(tmp_path / "data")
    monkeypatch.setattr(timing, "_MAX", 0.1)
    cfg = compose(*SMALL, f"data.root={tmp_path}/data", "adapter=full", "data.batch_size=2")
    times = choose.time_config(to_container(cfg), trains=True, freezes=True, minutes=9)
    assert min(times.tuned, times.frozen, times.forward, times.val) > 0
    late = choose.time_config(to_container(cfg), trains=True, freezes=True, minutes=9, until=0.0)
    assert late.tuned is None and late.frozen > 0  # the trained backbone is left out
    alone = choose.time_config(to_container(cfg), trains=True, freezes=False, minutes=9, until=0.0)
    assert alone.tuned > 0 and alone.frozen is None


OVERLAPS = ("data.root=overlaps", "data.classes=[disc,square]", "budget.minutes=1")


def write_pages(folder):
    """Write TIFF masks with a page for each class instead of a folder for each class."""
    for path in sorted((folder / "overlaps").glob("*/masks/disc/*.png")):
        pages = [Image.open(path.parents[1] / label / path.name) for label in ("disc", "square")]
        target = path.parents[1] / f"{path.stem}.tif"
        pages[0].save(target, save_all=True, append_images=pages[1:])
    for path in (folder / "overlaps").glob("*/masks/*/*.png"):
        path.unlink()
    for path in (folder / "overlaps").glob("*/masks/*/"):
        path.rmdir()


@pytest.mark.parametrize("pages", [False, True])
def test_masks_of_one_class_each_choose_multilabel(folder, choose_recipe, monkeypatch, pages):
    write_overlaps(folder / "overlaps", train=5, val=2)
    if pages:
        write_pages(folder)
    cfg, done = choose_recipe(*OVERLAPS)
    assert (cfg.choices.task, cfg.choices.loss, cfg.loss.weights) == ("multilabel", "bce_dice", "none")
    assert "2 classes that may overlap" in done.out and "task=multilabel: each class has masks of its own" in done.out
    monkeypatch.setattr(choose, "run_in_process", pytest.fail)
    again, done = choose_recipe(*OVERLAPS, folder_of_run="S")
    assert "reused from" in done.out and again.choices == cfg.choices
    (command,) = (shlex.split(line)[3:] for line in done.out.splitlines() if "hparam=chosen" in line)
    rerun, _ = choose_recipe(start=command, folder_of_run="T")
    assert rerun.choices.task == "multilabel"


def test_typed_task_is_not_replaced(folder, choose_recipe):
    write_overlaps(folder / "overlaps", train=5, val=2)
    cfg, done = choose_recipe(*OVERLAPS, "task=multilabel", "loss=bce", "task.threshold=0.3")
    assert (cfg.choices.task, cfg.choices.loss, cfg.task.threshold) == ("multilabel", "bce", 0.3)
    done = call(folder, *AUTO, "mode=plan", *OVERLAPS, "task=semantic")
    assert done.status == 1 and "Masks of one class each need task=multilabel" in done.err


def test_unreadable_masks_are_reported_for_class_ids(folder, choose_recipe):
    cfg, _ = choose_recipe("budget.minutes=1")
    assert cfg.choices.task == "semantic"
    for path in (folder / "data/train/masks").iterdir():
        save(path, np.full((32, 48), 7, np.uint8))
    done = call(folder, *AUTO, "mode=plan", "budget.minutes=1", "hydra.run.dir=Q")
    assert done.status == 1 and "7" in done.err and "multilabel" not in done.err


@pytest.mark.heavy
def test_overlapping_classes_are_not_solved_in_closed_form(folder, choose_by_clock):
    write_overlaps(folder / "overlaps", train=5, val=2)
    cfg, done = choose_by_clock(1, *OVERLAPS, timed=SLOW)
    assert cfg.head.get("init") is None and cfg.choices.adapter == "frozen" and cfg.trainer.steps == 1, done.out


@pytest.mark.heavy
def test_training_of_overlapping_classes_runs_as_chosen(folder):
    write_overlaps(folder / "overlaps", train=5, val=2)
    done = call(folder, *AUTO, *OVERLAPS, "trainer.steps=3", "hydra.run.dir=R")
    assert done.status == 0 and (folder / "R/evaluation/scores.json").exists(), done.err
