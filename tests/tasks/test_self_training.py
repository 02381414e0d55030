"""Few masks and a teacher: the same for any worker count, the same after a stop, and refused where it cannot be."""

import json
import logging
import shutil

import numpy as np
import pytest
import torch
from command_line import SMALL, call, in_this_process, write_data
from films import write_film
from finished_runs import rows, trained
from refused_trainings import refusal

from dinoseg.experiment.builder import Builder
from dinoseg.experiment.recipe import recipe_of
from dinoseg.tasks import unmasked
from dinoseg.training import checkpoint, trainer
from dinoseg.training.engine import Engine
from dinoseg.utils.images import write_png

WORDS = (
    *("mode=train", "trainer=self_training", *(word for word in SMALL if word != "trainer.steps=2")),
    *("mode.metrics_only=true", "mode.report=false", "mode.pictures=0", "trainer.val_every=4", "trainer.log_every=1"),
    *("trainer.threshold=0.5", "optim.schedule.kind=constant", "optim.schedule.warmup=0"),
)
HALF = (*WORDS, "data.labelled=0.5")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("self")
    write_data(where / "data", train=6, val=1)
    return where


@pytest.fixture
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.heavy
def test_a_run_goes_on_to_the_same_bytes_with_any_workers(folder):
    whole, done = trained(folder, "whole", *HALF, "trainer.steps=4")
    assert "3 training images with masks, 3 without" in done.err
    steps = [row for row in rows(folder, "whole") if "train/loss" in row]
    assert len(steps) == 4 and all(0 <= row["train/sure"] <= 1 and row["train/unlabelled"] >= 0 for row in steps)
    assert any(row["train/unlabelled"] > 0 for row in steps)
    trained(folder, "parts", *HALF, "trainer.steps=2", "engine.workers=2")
    parts, _ = trained(folder, "parts", *HALF, "trainer.steps=4", "resume=parts")
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)


def test_the_teacher_is_the_moving_average_and_leaves_the_student_as_it_is(folder, monkeypatch):
    seen, teach = [], trainer.predict_with_ema

    def watched(experiment, ema, images):
        model, names = experiment.model, list(ema.live)
        before = {name: ema.live[name].clone() for name in names}
        average = {name: value.clone() for name, value in ema.average.items()}
        prediction = teach(experiment, ema, images)
        assert model.training and all(torch.equal(ema.live[name], before[name]) for name in names)
        state = model.state_dict()
        model.load_state_dict({**state, **average})
        with torch.no_grad():
            own = model.eval()(images)
        model.load_state_dict({**state, **before})
        model.train()
        assert torch.equal(prediction.logits(), own.logits()) and not prediction.logits().requires_grad
        seen.append(any(not torch.equal(before[name], average[name]) for name in names))
        return prediction

    monkeypatch.setattr(trainer, "predict_with_ema", watched)
    trained(folder, "watched", *HALF, "trainer.steps=3", "engine.precision=fp32")
    assert seen == [False, True, True]


@pytest.mark.parametrize("loss", ["cross_entropy", "ce_dice", "focal"])
def test_weights_of_classes_are_for_masks_alone(here, compose, loss):
    """A teacher that learnt by them gives rare classes more pixels than they have: weighted again, ever more."""
    cfg = compose(*HALF, f"loss={loss}", "loss.weights={bright: 3}", "trainer.unlabelled_weight=0.25")
    task = Builder(cfg).task()
    task.open(Engine("cpu", "fp32", workers=0))
    objective = task.wrap_loss(Builder(cfg).loss(task.labelled))
    assert type(objective.of_views) is type(objective.criterion) and objective.weight == 0.25
    for part, weights in (("criterion", [1.0, 3.0]), ("of_views", [1.0, 1.0])):
        found = [value.tolist() for name, value in getattr(objective, part).named_buffers() if name.endswith("weight")]
        assert found and all(value == weights for value in found)


def test_frames_of_a_video_are_learnt_from(folder):
    write_film(folder / "film.mp4", frames=24)
    more = ("trainer.unlabelled=film.mp4", "trainer.unlabelled_every=0.25", "trainer.unlabelled_batch_size=4")
    _, done = trained(folder, "video", *WORDS, *more, "trainer.steps=1", "trainer.strong_views=1")
    assert "6 training images with masks, 4 without" in done.err


def test_each_image_is_there_once_and_those_of_the_validation_are_told_of(here, compose, caplog):
    cfg = compose(*HALF, "trainer.unlabelled='data/*/images/*.png'")
    with caplog.at_level(logging.INFO):
        Builder(cfg).task().open(Engine("cpu", "fp32", workers=0))
    assert "3 training images with masks, 7 without" in caplog.text
    assert "1 of the images without masks are validation images, so the scores" in caplog.text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("data.labelled=null",), "has no images without masks. Give trainer.unlabelled="),
        (("trainer.ema=null",), "the moving average is the teacher"),
        (("engine.cache=memory",), "their features cannot be cached"),
        (("data.feature_noise=0.1",), "data.feature_noise=0.1 is for training on masks only"),
        (("trainer.unlabelled_batch_size=4",), "trainer.unlabelled_batch_size=4 with 3 images without masks"),
        (("trainer.threshold=1.5",), "trainer.threshold=1.5 is out of range"),
        (("trainer.strong_views=17",), "Give a whole number from 1 to 16"),
        (("data.labelled=null", "trainer.unlabelled=nowhere"), "trainer.unlabelled=nowhere"),
        (("data.labelled=names.txt",), "data.labelled=names.txt: 1 of its names are not in the training split"),
        (("data.labelled=0",), "data.labelled=0 is out of range"),
    ],
)
def test_what_does_not_go_together_is_refused(folder, compose, words, said):
    (folder / "names.txt").write_text("0\nnot there\n")
    assert said in refusal(compose, folder, (*HALF, "trainer.steps=1"), words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (WORDS, "has no images without masks. Give trainer.unlabelled="),
        (
            ("mode=plan", *(word for word in HALF if not word.startswith(("mode.", "mode=train")))),
            "trainer=self_training is not supported:",
        ),
    ],
    ids=["masks alone", "plan"],
)
def test_a_command_without_images_to_learn_from_is_refused(folder, words, said):
    refused = call(folder, *words, "trainer.steps=1", "hydra.run.dir=refused")
    assert refused.status == 1 and said in refused.err, refused.err


@pytest.fixture
def photos(folder, tmp_path):
    """Return a folder of images of which one is broken, and the words that train on it."""
    shutil.copytree(folder / "data/train/images", tmp_path / "photos")
    broken = tmp_path / "photos/1.png"
    broken.write_bytes(broken.read_bytes()[:1000])
    return broken, (*WORDS, f"trainer.unlabelled={tmp_path / 'photos'}", "trainer.steps=2")


def test_broken_images_without_masks_stop_a_run_by_name_or_are_left_out(folder, photos):
    broken, words = photos
    done = call(folder, *words, "hydra.run.dir=broken")
    said = "Or leave such images without masks out: data.on_error=skip."
    assert done.status == 1 and f"Cannot read {broken} as an image" in done.err and said in done.err, done.err
    _, done = trained(folder, "mended", *words, "data.on_error=skip")
    assert f"left out of the images without masks: 1. Cannot read {broken}" in done.err, done.err
    assert "6 training images with masks, 5 without" in done.err


def test_many_images_without_masks_are_read_in_processes(here, photos, compose, monkeypatch, caplog):
    asked = []

    def pickled(work, items, processes, *, remedy):
        asked.append(processes)
        return [(each, in_this_process(work, each)) for each in items]

    monkeypatch.setattr(unmasked, "_FEW", 2)
    monkeypatch.setattr(unmasked, "in_processes", pickled)
    broken, words = photos
    task = Builder(compose(*words, "data.on_error=skip", "data.workers=2")).task()
    task.open(Engine("cpu", "fp32", workers=0))
    assert asked == [2] and f"left out of the images without masks: 1. Cannot read {broken}" in caplog.text
    assert len(task.data_module.unlabelled) == 5


def test_masks_of_one_class_alone_are_refused(compose, tmp_path):
    write_data(tmp_path / "data", train=4, val=1)
    base = (*HALF, f"data.root={tmp_path / 'data'}", "trainer.steps=1")
    for value, said in (
        (0, "hold dark alone: the teacher would predict it"),
        (255, "255 is ignored, so there is nothing to learn"),
    ):
        for number in range(4):
            write_png(tmp_path / f"data/train/masks/{number}.png", np.full((32, 48), value, np.uint8))
        assert said in refusal(compose, tmp_path, base, [])


def test_a_share_of_the_masks_is_another_recipe(folder):
    trained(folder, "all", "mode=train", *SMALL, "mode.metrics_only=true", "mode.report=false", "data.labelled=1.0")
    info = checkpoint.describe(folder / "all/checkpoints/last.safetensors")
    none = json.loads(json.dumps(info))
    none["config"]["data"]["labelled"] = None
    assert recipe_of(none) != recipe_of(info)


@pytest.mark.heavy
def test_two_ranks_resume_to_the_same_bytes(folder):
    """Resume by commands that start ranks; of BatchNorm each has its own running means, the teacher the first's."""
    words = (*HALF, "head=linear", "trainer.val_every=9", "engine.devices=2")
    whole, _ = trained(folder, "ranks", *words, "trainer.steps=3")
    trained(folder, "ranks_parts", *words, "trainer.steps=1")
    resumed, _ = trained(folder, "ranks_parts", *words, "trainer.steps=3", "resume=ranks_parts")
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)
