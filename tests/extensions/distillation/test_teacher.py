"""A teacher's scores of a picture are what mode=predict is asked for, and no other run's; foreign ones are refused."""

import hashlib
import json
import os
import shutil
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from command_line import SMALL, write_data
from finished_runs import train_run
from mistakes import assert_refused
from omegaconf import OmegaConf

import dinoseg
from dinoseg.core.geometry import upsample
from dinoseg.data.classes.labels import Labels
from dinoseg.experiment.builder import Builder
from dinoseg.experiment.models import ModelBuilder
from dinoseg.extensions.distillation.teacher import Teacher
from dinoseg.training import checkpoint
from dinoseg.training.engine import Engine
from dinoseg.utils.errors import UserError

LABELS = Labels.of(["dark", "bright"], [[0, 0, 0], [255, 255, 255]], 255)
SIZES = ((33, 50), (9, 17), (150, 210))  # the last is reduced
SHORT = (
    *("mode=train", *(word for word in SMALL if word != "trainer.steps=2"), "trainer.steps=1"),
    *("mode.metrics_only=true", "mode.report=false", "mode.pictures=0"),
)
BLACK = torch.zeros(3, 9, 9, dtype=torch.uint8)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Return a function that trains a teacher once and returns its folder.

    Teachers: cells of 8 px; masks; 2 px, seen at half the size; these in windows, and of 1 px.
    """
    where = tmp_path_factory.mktemp("teachers")
    write_data(where / "data", train=2, val=1, size=(40, 56))
    kinds = {
        "linear": ("head=linear", "resolution.longest=50"),
        "eomt": ("head=eomt", "head.num_queries=4", "head.blocks=1", "head.layers=[-1]", "loss=mask_classification"),
        "detail": ("head=detail", "head.fine=4", "head.width=8", "head.layers=[-1]", "resolution.scale=0.5"),
    }
    kinds["windows"] = (*kinds["detail"], "inference=windows", "inference.size=24", "head.linear_skip=false")
    kinds["pixels"] = (*kinds["windows"], "resolution.scale=2", "head.linear_skip=true")

    @cache
    def train(kind):
        train_run(where, kind, *SHORT, *kinds[kind])
        return where / kind

    return train


@pytest.fixture
def linear(teachers):
    """Return the checkpoint of the teacher with a linear head."""
    return teachers("linear") / "checkpoints/best.safetensors"


def picture(size):
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, *size)).astype(np.uint8))


def teacher(compose, path, labels=LABELS, precision="fp32"):
    cfg = compose("trainer=distil", "data.classes=[dark,bright]", "data.root=none", "backbone=tiny")
    cfg = OmegaConf.merge(cfg, {"teacher": str(path) if isinstance(path, Path) else path})
    return Teacher(Builder(cfg), Engine(device="cpu", precision=precision, workers=0), labels)


@pytest.mark.parametrize(
    ("kind", "within"),
    [
        ("linear", 1e-5),
        ("detail", 1e-5),
        pytest.param("eomt", 0.02, marks=pytest.mark.heavy),
        pytest.param("windows", 0.08, marks=pytest.mark.heavy),
    ],
)
def test_scores_are_of_the_probabilities_that_the_model_predicts(teachers, compose, caplog, kind, within):
    path = teachers(kind)
    asked = teacher(compose, path)
    drawn = torch.get_rng_state()
    model = dinoseg.load(path, device="cpu", precision="fp32")
    for size in SIZES:
        image = picture(size)
        caplog.clear()
        torch.set_rng_state(drawn)
        scores, valid = asked(image)
        assert torch.equal(torch.get_rng_state(), drawn)  # a student draws as without
        reduced = f"larger than those of the training of teacher={path}," in caplog.text
        assert reduced == (size == SIZES[-1] and kind in ("detail", "eomt"))
        assert "Set resolution.longest" not in caplog.text
        assert len(scores) == 2 and scores.amax(0).abs().max() == 0 and scores.min() < 0
        wanted = torch.from_numpy(model.predict(image.permute(1, 2, 0).numpy()).probabilities)
        found = upsample(scores[None], size, valid)[0].softmax(0)
        assert (found - wanted).abs().max() < within, size
        assert (found - wanted).abs().mean() < 0.5 * wanted.std(dim=(1, 2)).mean(), size


@pytest.mark.parametrize(("kind", "cell"), [("windows", 4), pytest.param("pixels", 1, marks=pytest.mark.heavy)])
def test_teacher_scores_of_windows_equal_predictions_at_cells(teachers, compose, kind, cell):
    """Exactly; between cells of 4 px no grid holds what windows predict, and the more the scores say the less it does.

    The nearest grid in the least squares differs by 0.081 where this one does by 0.100 (150 x 210).
    """
    asked = teacher(compose, teachers(kind))
    model = dinoseg.load(teachers(kind), device="cpu", precision="fp32")
    for size in SIZES:
        image = picture(size)
        scores, valid = asked(image)
        predicted = torch.from_numpy(model.predict(image.permute(1, 2, 0).numpy()).probabilities)
        assert scores.shape[1:] == tuple(-(-side // cell) for side in size) and valid == (1.0, 1.0)
        wanted = F.interpolate(predicted[None], scores.shape[1:], mode="bilinear")[0]
        torch.testing.assert_close(scores.softmax(0), wanted, atol=1e-5, rtol=0)


def test_teacher_cache_key_depends_on_file_and_inference(teachers, linear, compose):
    first = teacher(compose, teachers("linear")).parts
    assert first == teacher(compose, linear).parts
    for kind, part in (("detail", "teacher"), ("detail", "code"), ("windows", "inference")):
        assert teacher(compose, teachers(kind)).parts[part] != first[part], kind
    coarse = teacher(compose, linear, precision="bf16").parts
    assert [part for part in coarse if coarse[part] != first[part]] == ["precision"]


def test_a_file_that_changes_before_it_is_read_is_not_used(teachers, linear, compose, tmp_path):
    path = Path(shutil.copy(linear, tmp_path))
    asked = teacher(compose, path)
    shutil.copy(teachers("detail") / "checkpoints/best.safetensors", path)
    message = assert_refused(lambda: asked(BLACK), "best.safetensors has changed since this run started")
    path.unlink()
    gone = assert_refused(lambda: asked(BLACK), "best.safetensors: No such file or directory. Check that file")
    assert message.startswith("teacher=") and gone.startswith("teacher=")


def test_refused_teacher_file_is_read_only_up_to_its_header(linear, compose, tmp_path, monkeypatch):
    monkeypatch.setattr(hashlib, "file_digest", lambda *_: pytest.fail("it was read whole"))
    path = tmp_path / "best.safetensors"
    os.mkfifo(path)
    assert_refused(lambda: teacher(compose, path), "teacher=", " holds neither ")
    path.unlink()
    path.touch()
    os.truncate(path, 2**40)  # sparse
    assert_refused(lambda: teacher(compose, path), "teacher=", "best.safetensors: not a readable checkpoint")
    saved = checkpoint.read(linear)
    info = {key: value for key, value in saved.info.items() if key != "format"}
    checkpoint.write(path, saved.tensors | {"model/extra": torch.zeros(1)}, info)
    assert_refused(lambda: teacher(compose, path), "teacher=", "1 tensors unexpected (such as extra)")
    assert_refused(lambda: teacher(compose, linear, Labels.of(["dark"], [[0, 0, 0]], 255)), "other classes")


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["dark", "light"], "lacks light; it has bright, which the data lacks"),
        (["dark", "bright", "grey"], "other classes than the data: it lacks grey. A student"),
        (["dark"], "other classes than the data: it has bright, which"),
        (["bright", "dark"], "other classes than the data: their order is dark, bright"),
    ],
)
def test_other_classes_are_refused(linear, compose, names, said):
    labels = Labels.of(names, [[number] * 3 for number in range(len(names))], 255)
    assert_refused(lambda: teacher(compose, linear, labels), said)


def test_slot_model_is_refused_as_teacher(linear, compose, monkeypatch):
    slots = SimpleNamespace(head=SimpleNamespace(no_classes="slots"))
    monkeypatch.setattr(ModelBuilder, "check_fits", lambda *_: slots)
    assert_refused(lambda: teacher(compose, linear), "teacher=", "predicts slots. Give a model that scores classes")


def test_invalid_teacher_is_refused_by_name(linear, compose, tmp_path):
    text, cut = tmp_path / "text.safetensors", tmp_path / "cut.safetensors"
    text.write_text("no model")
    cut.write_bytes(linear.read_bytes()[:-9])
    for path in (tmp_path / "nowhere", text, cut, tmp_path):
        assert "resume=" not in assert_refused(lambda path=path: teacher(compose, path), f"teacher={path}")
    for path in (None, 3, ["a"]):
        assert_refused(lambda path=path: teacher(compose, path), "but teacher=", "Set teacher=RUN")


def write_changed(source, path, *keys, value):
    """Write a checkpoint with another value in its description."""
    info = json.loads(json.dumps(checkpoint.describe(source)))
    node = info
    for key in keys[:-1]:
        node = node[key]
    node[keys[-1]] = value
    del info["format"]
    checkpoint.write(path, checkpoint.read(source).tensors, info)
    return path


def test_foreign_config_is_checked_against_config_files(linear, compose, tmp_path):
    path = write_changed(linear, tmp_path / "best.safetensors", "config", "head", "_target_", value="os.system")
    assert_refused(lambda: teacher(compose, path), "teacher=", "_target_", "is refused")


CROP = r"resolution.crop=.* must be \[height, width\]"


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("sizes", {"typical": -1, "largest": 5}, "sizes.typical is -1; it must be"),
        ("config.resolution.longest", -3, "resolution.longest=-3 is out of range"),
        ("config.resolution.crop", [0, 0], r"resolution.crop=\[0, 0\] with"),
        ("config.resolution.crop", "wide", "resolution.crop='wide'"),
        ("config.resolution.crop", None, CROP),
        ("config.resolution.crop", [16, 16, 16], CROP),
        ("config.resolution.crop", [512.0, 512.0], CROP),
        ("config.inference.size", -5, "inference.size=-5 is out of range"),
    ],
)
def test_error_in_the_teacher_file_names_the_teacher(linear, compose, tmp_path, key, value, said):
    path = write_changed(linear, tmp_path / "best.safetensors", *key.split("."), value=value)
    with pytest.raises(UserError, match=f"^teacher={tmp_path}.*: .*{said}"):
        teacher(compose, path)(BLACK)


def test_huge_crop_in_a_file_allocates_no_memory(linear, compose, tmp_path):
    """Cells for each pixel are counted on an image of any size, which is how the crop is used."""
    assert teacher(compose, linear)._read()[1] == pytest.approx((1 / 8, 1 / 8))
    for crop in ([16384, 16384], [20, 29]):  # the latter no multiple of patches
        path = write_changed(linear, tmp_path / "best.safetensors", "config", "resolution", "crop", value=crop)
        assert teacher(compose, path)._read()[1] == pytest.approx((1 / 8, 1 / 8))


def test_teacher_scores_are_clamped_and_nan_is_refused(linear, compose):
    asked = teacher(compose, linear)
    predictor, cells = asked._read()
    with torch.no_grad():
        predictor.model.head.classify.weight *= 1e9
    asked._loaded = predictor, cells
    scores, _ = asked(torch.arange(243).view(3, 9, 9).to(torch.uint8))
    assert scores.min() == -3e4 and scores.half().isfinite().all()  # as it is kept
    with torch.no_grad():
        predictor.model.head.classify.weight[0] = float("nan")
    assert_refused(lambda: asked(BLACK), "returns scores that are not finite")
