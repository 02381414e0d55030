"""A student and its teacher: the same with kept scores and anew, after a stop and on ranks, and what is refused."""

import json
import re
import shutil

import pytest
import torch
from command_line import SMALL, call, succeed, write_data
from films import write_film
from finished_runs import rows, train_run, whole_and_resumed_on_ranks
from mistakes import command, refusals
from refused_trainings import refusal

import dinoseg
from dinoseg.experiment.recipe import recipe_of
from dinoseg.extensions.distillation.teacher import Teacher
from dinoseg.training import checkpoint

PLAIN = (
    *("mode=train", *(word for word in SMALL if word != "trainer.steps=2")),
    *("mode.metrics_only=true", "mode.report=false", "mode.pictures=0", "trainer.val_every=9", "trainer.log_every=1"),
    *("optim.schedule.kind=constant", "optim.schedule.warmup=0"),
)
WORDS = (*PLAIN, "trainer=distil", "teacher=teacher", "trainer.temperature=2")
HALF = (*WORDS, "data.labelled=0.5")
FROZEN = ("adapter=frozen", "data.views=2", "engine.cache=disk", "trainer.unlabelled_batch_size=1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("distil")
    write_data(where / "data", train=6, val=1)
    train_run(where, "teacher", *PLAIN, "backbone.patch_size=4", "head=mlp", "trainer.steps=3")
    return where


@pytest.fixture(scope="module")
def supervised_run(folder):
    return train_run(folder, "supervised", *PLAIN, "trainer.steps=1")[0]


@pytest.fixture(scope="module")
def taught(folder):
    return train_run(folder, "taught", *WORDS, "trainer.steps=1", f"data.root={folder / 'data'}")[0]


@pytest.fixture(scope="module")
def cached_run(folder):
    return train_run(folder, "kept", *HALF, *FROZEN, "trainer.steps=2")


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.heavy
def test_resuming_equals_one_run_with_or_without_cached_scores(folder, monkeypatch):
    asked = []
    ask = Teacher.__call__
    monkeypatch.setattr(Teacher, "__call__", lambda teacher, image: asked.append(1) or ask(teacher, image))
    whole, done = train_run(folder, "whole", *HALF, "trainer.steps=4")
    assert "3 training images with masks, 3 without; teacher teacher" in done.err
    assert all(row["train/teacher"] > 0 for row in rows(folder, "whole") if "train/loss" in row)
    assert len(asked) == 6  # each image once, in four batches of two and two
    train_run(folder, "parts", *HALF, "trainer.steps=2", "engine.workers=2")
    parts, _ = train_run(folder, "parts", *HALF, "trainer.steps=4", "resume=parts")
    assert same(whole, parts) and len(asked) == 6
    (size,) = {path.stat().st_size for path in (folder / "outputs/.cache/teachers").rglob("*.features")}
    small = (f"features.gib={2.5 * size / 2**30}", "cache_dir=small")
    few, done = train_run(folder, "few", *HALF, "trainer.steps=4", *small)
    found = [path.stat().st_size for path in (folder / "small/teachers").rglob("*.features")]
    assert same(whole, few) and found == [size] * 2 and "at most: no more features are cached" in done.err


def test_zero_weight_without_other_images_is_supervised_training(folder, supervised_run, taught):
    weightless, _ = train_run(folder, "weightless", *WORDS, "trainer.teacher_weight=0", "trainer.steps=1")
    assert same(weightless, supervised_run) and not same(taught, supervised_run)


def test_frozen_student_trains_from_cached_features(folder, cached_run):
    whole, done = cached_run
    assert "Feature cache: on (engine.cache=disk)" in done.err
    live, _ = train_run(folder, "live", *HALF, *FROZEN, "trainer.steps=2", "features.dtype=float32")
    assert all(torch.allclose(live[name], whole[name], atol=1e-2) for name in live if name.startswith("model/"))


@pytest.mark.heavy
def test_frozen_student_resumes_from_cached_features(folder, cached_run):
    train_run(folder, "kept_parts", *HALF, *FROZEN, "trainer.steps=1")
    parts, _ = train_run(folder, "kept_parts", *HALF, *FROZEN, "trainer.steps=2", "resume=kept_parts")
    assert same(cached_run[0], parts)


def test_packed_images_and_frames_of_a_video_are_distilled(folder, monkeypatch):
    sizes = set()
    ask = Teacher.__call__
    monkeypatch.setattr(Teacher, "__call__", lambda self, image: sizes.add(tuple(image.shape)) or ask(self, image))
    write_film(folder / "film.mp4", frames=24)
    film = ("trainer.unlabelled=film.mp4", "trainer.unlabelled_every=0.25", "trainer.unlabelled_batch_size=4")
    packed = ("data.cache=packed", "resolution.longest=24", "resolution.crop=[16,24]", "cache_dir=packed")
    _, done = train_run(folder, "packed", *WORDS, *packed, *film, "trainer.steps=1")
    assert "6 training images with masks, 4 without" in done.err
    split = json.loads((folder / "packed/split.json").read_text())
    assert split["unlabelled"] == [f"unlabelled/{frame:09d}" for frame in (0, 6, 12, 18)]
    assert (3, 32, 48) in sizes and len(sizes) == 2  # as in their files; the film has another


STUDENTS = {
    "eomt": ("head=eomt", "head.num_queries=4", "head.blocks=1", "head.layers=[-1]", "loss=mask_classification"),
    "detail": ("head=detail", "head.fine=4", "head.width=8", "head.layers=[-1]", "resolution.scale=0.5"),
    "lora": ("adapter=lora", "backbone.patch_size=16", "trainer.ema=0.9", "trainer.accumulate=2"),
}


@pytest.mark.parametrize(
    "student", ["eomt", *(pytest.param(one, marks=pytest.mark.heavy) for one in ("detail", "lora"))]
)
def test_students_of_any_kind_are_distilled(folder, student):
    """A step of so large a weight lets it say nearly what its teacher says."""
    steps = 12 if student == "lora" else 6  # lora learns more slowly
    words = (*STUDENTS[student], f"trainer.steps={steps}", "trainer.teacher_weight=20", "optim.optimizer.lr=3e-3")
    train_run(folder, student, *HALF, *words)
    found = [row["train/teacher"] for row in rows(folder, student) if "train/loss" in row]
    assert sum(found[-3:]) < 0.8 * sum(found[:3]), found


@pytest.mark.heavy
def test_run_resumes_from_another_folder_and_teacher_path(folder, supervised_run, taught, tmp_path):
    shutil.copytree(folder / "taught", folder / "moved")
    info = checkpoint.describe(folder / "moved/checkpoints/last.safetensors")
    assert info["config"]["teacher"] == str(folder / "teacher") and "teacher" not in info["config"]["trainer"]
    words = ("mode=train", f"resume={folder / 'moved'}", "engine=cpu", "engine.workers=0", *PLAIN[-7:-2])
    done = succeed(tmp_path, *words, "trainer.steps=3")
    (folder / "teacher").rename(folder / "elsewhere")
    refused = call(tmp_path, *words, "trainer.steps=4")
    assert refused.status == 1 and f"teacher={folder / 'teacher'}: file or folder not found" in refused.err
    done = call(tmp_path, *words, "trainer.steps=4", f"teacher={folder / 'elsewhere'}")
    (folder / "elsewhere").rename(folder / "teacher")
    assert done.status == 0 and "other settings" not in done.err, done.err
    done = call(tmp_path, *words, "trainer.steps=5", f"teacher={folder / 'supervised'}")
    assert done.status == 0 and re.search(r"other settings: teacher was sha256 \w+ and is", done.err)


def test_a_student_in_one_file_names_no_place_of_its_teacher(folder, taught):
    succeed(folder, "mode=export", "export=safetensors", "resume=taught", "engine=cpu", "hydra.run.dir=file")
    said = checkpoint.describe(folder / "file/model.safetensors")
    assert "teacher" not in said["config"] and str(folder) not in json.dumps(said)
    found = dinoseg.load(folder / "file", device="cpu").predict(folder / "data/val/images/0.png")
    assert found.mask.shape == (32, 48)


def test_other_teacher_is_another_recipe(folder, supervised_run, taught):
    info = checkpoint.describe(folder / "taught/checkpoints/last.safetensors")
    other = json.loads(json.dumps(info))
    other["config"]["teacher"] += "2"
    assert recipe_of(other) != recipe_of(info)
    assert "teacher" not in checkpoint.describe(folder / "supervised/checkpoints/last.safetensors")["config"]


@pytest.mark.heavy
def test_auto_resumes_a_run_of_the_same_teacher(folder, taught, tmp_path):
    shutil.copytree(folder / "taught", tmp_path / "taught")
    words = (*WORDS, "trainer.steps=2", f"data.root={folder / 'data'}", f"teacher={folder / 'teacher'}")
    _, found = train_run(tmp_path, "taught", *words, "resume=auto")
    assert "resuming" in found.err
    assert checkpoint.describe(tmp_path / "taught/checkpoints/last.safetensors")["progress"]["step"] == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("trainer.unlabelled_batch_size=2",), "trainer.unlabelled_batch_size=2: there are no images without"),
        (("data.labelled=0.5", "trainer.unlabelled_batch_size=4"), "_batch_size=4 with 3 images without masks"),
        (("trainer.unlabelled=nowhere",), "trainer.unlabelled=nowhere"),
        (("trainer.temperature=0",), "trainer.temperature=0 is out of range. Give a number from 0.01 to 100"),
    ],
)
def test_incompatible_options_are_refused(folder, compose, words, said):
    assert said in refusal(compose, folder, (*WORDS, "trainer.steps=1"), words)


test_message_names_value_and_remedy = refusals(
    {
        "no teacher": (
            command(*PLAIN, "trainer=distil", "data.root=."),
            "needs a trained model, but teacher=null. Set teacher=RUN",
        ),
        "not a key of it": (
            command(*WORDS, "~trainer.temperature", "data.root=."),
            "~trainer.temperature removes a key that is read",
        ),
        "plan": (
            command("mode=plan", *(word for word in WORDS if not word.startswith(("mode.", "mode=train")))),
            "trainer=distil is not supported:",
        ),
    }
)


@pytest.mark.heavy
def test_two_ranks_resume_to_equal_bytes(folder, compose):
    words = (*HALF, "head=linear", "engine.devices=2", "trainer.unlabelled_batch_size=2", "trainer.steps=3")
    assert same(*whole_and_resumed_on_ranks(folder, compose, words))
