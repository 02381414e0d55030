"""A student and its teacher: the same with kept scores and anew, after a stop and on ranks, and what is refused."""

import json
import re
import shutil

import pytest
import torch
from command_line import SMALL, call, write_data
from films import write_film
from finished_runs import rows, trained

import dinoseg
from dinoseg.experiment.recipe import recipe_of
from dinoseg.experiment.teacher import Teacher
from dinoseg.tasks import distil
from dinoseg.training import checkpoint
from dinoseg.training.distilled import DistilFeed
from dinoseg.training.feature_cache import store

PLAIN = (
    *("mode=train", *(word for word in SMALL if word != "trainer.steps=2")),
    *("mode.metrics_only=true", "mode.report=false", "mode.pictures=0", "trainer.val_every=9", "trainer.log_every=1"),
    *("optim.schedule.kind=constant", "optim.schedule.warmup=0"),
)
WORDS = (*PLAIN, "trainer=distil", "teacher=teacher", "trainer.temperature=2")
HALF = (*WORDS, "data.labelled=0.5")
FROZEN = ("adapter=frozen", "data.views=2", "engine.cache=disk")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("distil")
    write_data(where / "data", train=6, val=1)
    other = ("backbone.patch_size=4", "head=mlp", "trainer.steps=3")
    done = call(where, *PLAIN, *other, "hydra.run.dir=teacher")
    assert done.status == 0, done.err
    return where


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.heavy
def test_a_run_goes_on_to_the_same_bytes_whether_scores_are_kept_or_not(folder, monkeypatch):
    asked, ask = [], Teacher.__call__
    monkeypatch.setattr(Teacher, "__call__", lambda teacher, image: asked.append(1) or ask(teacher, image))
    whole, done = trained(folder, "whole", *HALF, "trainer.steps=4")
    assert "3 training images with masks, 3 without; taught by teacher" in done.err
    assert all(row["train/teacher"] > 0 for row in rows(folder, "whole") if "train/loss" in row)
    assert len(asked) == 6  # each image once, in four batches of two and two
    trained(folder, "parts", *HALF, "trainer.steps=2", "engine.workers=2")
    parts, _ = trained(folder, "parts", *HALF, "trainer.steps=4", "resume=parts")
    assert same(whole, parts) and len(asked) == 6
    (size,) = {path.stat().st_size for path in (folder / "outputs/.cache/teachers").rglob("*.features")}
    shutil.rmtree(folder / "outputs/.cache/teachers")
    monkeypatch.setattr(store, "_RESERVE", 2**80)  # the disk is full
    anew, done = trained(folder, "anew", *HALF, "trainer.steps=4")
    assert same(whole, anew) and len(asked) > 12 and "no more features are kept" in done.err
    monkeypatch.undo()
    few, done = trained(
        folder, "few", *HALF, "trainer.steps=4", f"features.gib={2.5 * size / 2**30}", "cache_dir=small"
    )
    found = [path.stat().st_size for path in (folder / "small/teachers").rglob("*.features")]
    assert same(whole, few) and found == [size] * 2 and "at most: no more features are kept" in done.err
    other, _ = trained(folder, "other", *HALF, "trainer.steps=4", "trainer.teacher_weight=0")
    assert not same(whole, other)


def test_without_weight_and_other_images_it_is_a_supervised_training(folder):
    first, _ = trained(folder, "weightless", *WORDS, "trainer.teacher_weight=0", "trainer.steps=3")
    second, _ = trained(folder, "supervised", *PLAIN, "trainer.steps=3")
    assert same(first, second)
    third, _ = trained(folder, "weighty", *WORDS, "trainer.steps=3")
    assert not same(first, third)


def test_a_frozen_student_trains_from_kept_features_and_goes_on(folder):
    words = (*HALF, *FROZEN, "trainer.unlabelled_batch_size=1")
    whole, done = trained(folder, "kept", *words, "trainer.steps=4")
    assert "engine.cache=disk: features are kept" in done.err
    trained(folder, "kept_parts", *words, "trainer.steps=1")
    parts, _ = trained(folder, "kept_parts", *words, "trainer.steps=4", "resume=kept_parts")
    live, _ = trained(folder, "live", *words, "trainer.steps=4", "features.dtype=float32")
    assert same(whole, parts)
    assert all(torch.allclose(live[name], whole[name], atol=1e-2) for name in live if name.startswith("model/"))


def test_packed_and_reduced_images_are_taught_as_their_files_are(folder, monkeypatch):
    sizes, ask = set(), Teacher.__call__
    monkeypatch.setattr(
        Teacher, "__call__", lambda teacher, image: sizes.add(tuple(image.shape)) or ask(teacher, image)
    )
    words = ("data.cache=packed", "resolution.longest=24", "resolution.crop=[16,24]", "cache_dir=packed")
    trained(folder, "packed", *WORDS, *words, "data.class_uniform=0.5", "trainer.steps=3")
    assert sizes == {(3, 32, 48)}


@pytest.mark.parametrize(
    "student",
    [
        ("head=eomt", "head.num_queries=4", "head.blocks=1", "head.layers=[-1]", "loss=mask_classification"),
        ("head=detail", "head.fine=4", "head.width=8", "head.layers=[-1]", "resolution.scale=0.5"),
        ("head=split", "head.layers=[0,-1]", "head.blocks=1", "adapter=frozen", "loss=ce_dice"),
        ("adapter=lora", "backbone.patch_size=16", "trainer.ema=0.9", "trainer.accumulate=2"),
    ],
    ids=lambda words: words[0],
)
def test_students_of_any_kind_are_taught(folder, student):
    """A step of so large a weight lets it say nearly what its teacher says."""
    words = (*HALF, *student, "trainer.steps=12", "trainer.teacher_weight=20", "optim.optimizer.lr=3e-3")
    trained(folder, "student", *words)
    found = [row["train/teacher"] for row in rows(folder, "student") if "train/loss" in row]
    shutil.rmtree(folder / "student")
    assert sum(found[-3:]) < 0.8 * sum(found[:3]), found


def test_images_without_masks_are_drawn_for_no_class(folder, monkeypatch):
    made = []
    monkeypatch.setattr(distil, "DistilFeed", lambda **given: made.append(given) or DistilFeed(**given))
    trained(folder, "uniform", *HALF, "data.class_uniform=0.5", "trainer.steps=1")
    (given,) = made
    assert given["uniform"] is not None and given["others"].uniform is None


def test_frames_of_a_video_are_learnt_from(folder):
    write_film(folder / "film.mp4", frames=24)
    more = ("trainer.unlabelled=film.mp4", "trainer.unlabelled_every=0.25", "trainer.unlabelled_batch_size=4")
    _, done = trained(folder, "video", *WORDS, *more, "trainer.steps=1")
    assert "6 training images with masks, 4 without" in done.err


@pytest.mark.heavy
def test_a_run_goes_on_from_another_folder_and_with_another_place_of_its_teacher(folder, tmp_path, monkeypatch):
    trained(folder, "moved", *WORDS, "trainer.steps=1", f"data.root={folder / 'data'}")
    info = checkpoint.describe(folder / "moved/checkpoints/last.safetensors")
    assert info["config"]["teacher"] == str(folder / "teacher") and info["config"]["trainer"]["teacher"] == "${teacher}"
    words = ("mode=train", f"resume={folder / 'moved'}", "engine=cpu", "engine.workers=0", *PLAIN[-7:-2])
    done = call(tmp_path, *words, "trainer.steps=2")
    assert done.status == 0, done.err
    (folder / "teacher").rename(folder / "elsewhere")
    refused = call(tmp_path, *words, "trainer.steps=3")
    assert refused.status == 1 and f"teacher={folder / 'teacher'}: neither a checkpoint file" in refused.err
    done = call(tmp_path, *words, "trainer.steps=3", f"teacher={folder / 'elsewhere'}")
    (folder / "elsewhere").rename(folder / "teacher")
    assert done.status == 0 and "other numbers" not in done.err, done.err
    trained(folder, "another", *PLAIN, "backbone.patch_size=4", "head=mlp", "trainer.steps=1")
    done = call(tmp_path, *words, "trainer.steps=4", f"teacher={folder / 'another'}")
    assert done.status == 0 and re.search(r"other numbers than before: teacher was sha256 \w+ and is", done.err)


def test_a_student_in_one_file_names_no_place_of_its_teacher(folder):
    trained(folder, "shared", *WORDS, "trainer.steps=1")
    done = call(folder, "mode=export", "export=safetensors", "resume=shared", "engine=cpu", "hydra.run.dir=file")
    assert done.status == 0, done.err
    said = checkpoint.describe(folder / "file/model.safetensors")
    assert "teacher" not in said["config"] and str(folder) not in json.dumps(said)
    found = dinoseg.load(folder / "file", device="cpu").predict(folder / "data/val/images/0.png")
    assert found.mask.shape == (32, 48)


def test_another_teacher_is_another_recipe_and_older_checkpoints_have_none(folder):
    trained(folder, "recipe", *WORDS, "trainer.steps=1")
    info = checkpoint.describe(folder / "recipe/checkpoints/last.safetensors")
    other = json.loads(json.dumps(info))
    other["config"]["teacher"] += "2"
    assert recipe_of(other) != recipe_of(info)
    trained(folder, "older", *PLAIN, "trainer.steps=1")
    assert "teacher" not in checkpoint.describe(folder / "older/checkpoints/last.safetensors")["config"]
    found = call(folder, *WORDS, "trainer.steps=2", "resume=auto", "hydra.run.dir=any")
    assert found.status == 0 and "going on with" in found.err, found.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("trainer=distil",), "learns from a trained model, and teacher=null names none. Give teacher=RUN"),
        (("teacher=teacher",), "teacher=teacher is read by trainer=distil alone, and this is trainer=supervised"),
        (
            ("trainer.feed=distil",),
            "trainer=supervised does not say how a teacher is learnt from. Choose trainer=distil",
        ),
        ((*WORDS, "teacher=nowhere"), "teacher=nowhere: neither a checkpoint file nor a run folder"),
        ((*WORDS, "data.classes=[dark,light]"), "it does not know light; it knows bright"),
        ((*WORDS, "trainer.unlabelled_batch_size=2"), "trainer.unlabelled_batch_size=2: there are no images without"),
        ((*HALF, "trainer.unlabelled_batch_size=4"), "trainer.unlabelled_batch_size=4 with 3 images without masks"),
        ((*WORDS, "trainer.unlabelled=nowhere"), "trainer.unlabelled=nowhere"),
        ((*WORDS, "trainer.temperature=0"), "trainer.temperature=0 is out of range. Give a number from 0.01 to 100"),
        ((*WORDS, "trainer.temperature=1e30"), "trainer.temperature=1e+30 is out of range. Give a number from 0.01"),
        ((*WORDS, "trainer.teacher_weight=-1"), "trainer.teacher_weight=-1 is out of range"),
        ((*WORDS, "features.gib=-1"), "features.gib=-1 is out of range. Give a number above 0"),
        ((*WORDS, "data.class_mix=0.5"), "data.class_mix=0.5: a teacher's scores are of images as they are"),
        (("trainer=self_training", "teacher=teacher"), "teacher=teacher is read by trainer=distil alone"),
        ((*WORDS, "trainer.feed=self_training"), "this is trainer=distil with trainer.feed=self_training. Give"),
        ((*WORDS, "trainer.feed=images"), "this is trainer=distil with trainer.feed=images. Give"),
        *(
            ((*WORDS, f"~trainer.{key}"), f"~trainer.{key} takes away what is read")
            for key in ("teacher", "temperature", "teacher_weight")
        ),
        (("mode=plan", *WORDS), "trainer=distil is not foretold"),
    ],
)
def test_what_does_not_go_together_is_refused(folder, words, said):
    plans = words[0] == "mode=plan"  # which has no such keys of its own
    given = [word for word in (*PLAIN, *words) if not plans or not word.startswith(("mode.", "mode=train"))]
    refused = call(folder, *given, "trainer.steps=1", "hydra.run.dir=refused")
    assert refused.status == 1 and said in refused.err, refused.err


@pytest.mark.heavy
def test_two_ranks_go_on_to_the_same_bytes(folder):
    words = (*HALF, "head=linear", "engine.devices=2", "trainer.unlabelled_batch_size=2")
    whole, _ = trained(folder, "ranks", *words, "trainer.steps=3")
    trained(folder, "ranks_parts", *words, "trainer.steps=1")
    parts, _ = trained(folder, "ranks_parts", *words, "trainer.steps=3", "resume=ranks_parts")
    assert same(whole, parts)
