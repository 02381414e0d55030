"""Models whose weights were changed in memory are scored with these weights, not with those of their file."""

import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

import dinoseg

pytestmark = pytest.mark.slow
QUICK = {"metrics_only": True, "report": False}


@pytest.fixture
def run(trained_once):
    return dinoseg.Run(trained_once / "segmenter")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def of_a_frozen_backbone(model):
    return model.backbone.requires_grad_(False).parameters()


def of_batch_norm(model):
    return [part.running_mean for part in model.modules() if isinstance(part, nn.BatchNorm2d)]


@pytest.mark.parametrize("changed", [of_a_frozen_backbone, pytest.param(of_batch_norm, marks=pytest.mark.heavy)])
def test_changed_weights_are_scored_as_their_saved_file(trained_once, run, changed, tmp_path):
    model = run.load_model(device="cpu")
    file = tmp_path / "changed.safetensors"
    with torch.no_grad():
        for value in changed(model):
            value.copy_(torch.randn(value.shape, generator=torch.Generator().manual_seed(3)))
    model.save(file)
    evaluate = partial(dinoseg.evaluate, data={"root": trained_once / "data"}, engine="cpu", mode=QUICK)
    of_model, of_file = evaluate(model), evaluate(file)
    assert run.scores["miou"] != of_model["miou"] and of_model.to_dict() == of_file.to_dict()
    assert not dinoseg.load(file, device="cpu").facts.scores


@pytest.fixture
def model_file(tmp_path):
    """Return the file of a model with scores."""
    model = dinoseg.create_model("rgb", head="mlp", classes=["dark", "bright"])
    model.facts = replace(model.facts, scores={"split": "val", "values": {"miou": 0.5}, "per_class": {}})
    model.save(tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def overwrite(model, file):
    dinoseg.create_model("rgb", head="mlp", classes=["dark", "bright"], seed=1).save(file)


def delete(model, file):
    file.unlink()


@torch.no_grad()
def change_one_value(model, file):
    """Change a value that a sample of every 20th or so leaves out."""
    weights = max(model.head.parameters(), key=torch.Tensor.numel)
    assert weights.numel() > 2048
    weights.view(-1)[1] += 1


def change_colours(model, file):
    model.backbone.mean.add_(0.1)


OF_FILES = [pytest.param(change, marks=pytest.mark.heavy) for change in (overwrite, delete)]


@pytest.mark.parametrize("change", [change_one_value, change_colours, *OF_FILES])
def test_changed_model_or_file_is_read_from_a_copy(model_file, change, tmp_path):
    model = dinoseg.load(model_file, device="cpu")
    saved = tmp_path / "new.safetensors"
    model.save(saved)
    assert dinoseg.load(saved, device="cpu").facts.scores is not None
    with model.as_file() as path:
        assert path == model_file
    change(model, model_file)
    with model.as_file() as path:
        assert path != model_file
        again = dinoseg.load(path, device="cpu")
    images = torch.rand(1, 3, 16, 16)
    assert torch.equal(again(images), model(images))
    model.save(saved)
    of_other_weights = change in (change_one_value, change_colours)
    assert (dinoseg.load(saved, device="cpu").facts.scores is None) == of_other_weights


def test_loaded_model_is_unchanged_by_a_new_best_checkpoint(run, tmp_path):
    folder = shutil.copytree(run.folder, tmp_path / "run")
    file = tmp_path / "new.safetensors"
    best, last = (folder / f"checkpoints/{name}.safetensors" for name in ("best", "last"))
    model = dinoseg.load(folder, device="cpu")
    images = torch.ones(1, 3, 8, 8)
    model.save(file)
    assert dinoseg.load(file, device="cpu").facts.scores is not None
    best.rename(tmp_path / "best")
    of_last = dinoseg.load(folder, device="cpu")
    with of_last.as_file() as path:
        assert path == folder
    shutil.copy(tmp_path / "best", best)
    for each in (model, of_last):
        with each.as_file() as path:
            assert path != folder and torch.equal(dinoseg.load(path, device="cpu")(images), each(images))
    shutil.copy(last, best)
    model.save(file)
    assert dinoseg.load(file, device="cpu").facts.scores is None
